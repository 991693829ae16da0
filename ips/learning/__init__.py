"""Losses on logits, the backward pass in the memory of a chunk, and the learning rate.

Selections and labels come in; gradients come out. It must not know epochs, files or processes.
"""
