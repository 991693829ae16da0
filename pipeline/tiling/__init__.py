"""A slide's patches, on paper: where the tissue is, at which level and place each patch stands, and its encoding.

An open slide and what is given beside it (masks, coordinates) come in; rows of encoded patches and evidence for
people come out. Nothing is written here, and nothing is known of the store.
"""
