"""What looks at patches: encoder, positions, attention and aggregator, heads, and their composition.

Batches of patches come in; one tensor of logits a task comes out. It must not know how the patches were chosen.
"""
