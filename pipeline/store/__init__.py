"""Committed patches and features: written whole or not at all, read by exact ranges, verified.

Encoded patches or vectors come in, a commit record last; readers see committed slides only. It must not know Ray, nor
what reads them.
"""
