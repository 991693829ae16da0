"""Losses on logits, the backward pass in the memory of a chunk, and the learning rate.

Bags, selections and labels come in; gradients come out, averaged over the processes where there are several. It must
not know epochs, files, or which patches should have been selected.
"""
