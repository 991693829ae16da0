"""The synthetic cohort: slides with a question that only a few patches can answer.

A size and a seed come in; pyramidal TIFFs and their cohort file come out, byte for byte the same. It knows nothing of
how they are read.
"""
