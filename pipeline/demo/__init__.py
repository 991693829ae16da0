"""The synthetic cohort: slides with a question that few patches answer, and one that all of them do.

A size and a seed come in; pyramidal TIFFs and their cohort file come out, byte for byte the same. It knows nothing of
how they are read.
"""
