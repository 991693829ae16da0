"""Bytes by URI: files here and on S3, ranges of them, leases on them, copies of them on a node.

The only room that knows s3fs. It must not know what the bytes mean.
"""
