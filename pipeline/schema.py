"""Arrow schemas of everything that is committed; `version` stands in each schema's metadata."""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 2  # part of the patch store's key, so a change of layout never reads old files

_META = {b"ips.schema_version": str(SCHEMA_VERSION).encode()}

PATCHES = pa.schema(
    [
        pa.field("cell", pa.int64(), nullable=False),  # number in the slide's plan, with gaps where one was lost
        pa.field("x", pa.int64(), nullable=False),  # level-0 px of the patch's left edge
        pa.field("y", pa.int64(), nullable=False),  # level-0 px of its upper edge
        pa.field("level", pa.int32(), nullable=False),  # pyramid level that was read
        pa.field("image", pa.large_binary(), nullable=False),  # one JPEG
    ],
    metadata=_META,
)

INDEX = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # of the slide's stored patches, without gaps
        pa.field("cell", pa.int64(), nullable=False),  # as in the part
        pa.field("x", pa.int64(), nullable=False),
        pa.field("y", pa.int64(), nullable=False),
        pa.field("level", pa.int32(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),  # part-<part>.arrow
        pa.field("offset", pa.int64(), nullable=False),  # absolute byte offset of the JPEG in the part
        pa.field("length", pa.int64(), nullable=False),  # its length in bytes
    ],
    metadata=_META,
)

ATTENTION = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("x", pa.int64(), nullable=False),
        pa.field("y", pa.int64(), nullable=False),
        pa.field("attention", pa.float32(), nullable=False),  # sums to 1 over a slide's patches
        pa.field("selected", pa.bool_(), nullable=False),  # one of the M kept
    ],
    metadata=_META,
)
