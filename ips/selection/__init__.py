"""Which M of an image's N patches the network looks at: without gradient, in memory that does not depend on N.

A model and bags come in; rows, scores and attention come out (paper, Algorithm 1). It must not know losses.
"""
