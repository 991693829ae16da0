"""Where patches come from: the one seam between every kind of source and whoever reads them.

Slides (stored, streamed, generated, or as features) come in; chunks of patches as `ips` takes them come out, decoded
ahead of use, in constant memory. It must not know what is learned from them.
"""
