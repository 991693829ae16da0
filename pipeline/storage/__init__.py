"""Bytes by URI: files here and in clouds, ranges of them, leases on them, copies of them on a node.

The only room that knows s3fs and obstore. It must not know what the bytes mean.
"""
