"""Arrow schemas of everything that is committed; `version` stands in each schema's metadata."""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 6  # part of the patch store's key, so a change of layout, or of masks, never meets old files

_META = {b"ips.schema_version": str(SCHEMA_VERSION).encode()}

PATCHES = pa.schema(
    [
        pa.field("cell", pa.int64(), nullable=False),  # number in the slide's plan, with gaps where one was lost
        pa.field("x", pa.int64(), nullable=False),  # level-0 px of the patch's left edge
        pa.field("y", pa.int64(), nullable=False),  # level-0 px of its upper edge
        pa.field("level", pa.int32(), nullable=False),  # pyramid level that was read
        pa.field("image", pa.large_binary(), nullable=False),  # one JPEG; a second with tiling.context_mpp
    ],
    metadata=_META,
)

PACK = pa.schema(
    [
        *PATCHES,  # of a plan the images are empty
        pa.field("slide", pa.int32(), nullable=False),  # number of the slide in its batch
        pa.field("index", pa.binary()),  # in a slide's first row: int32 of cell, x, y, length (of a plan: left, top)
        pa.field("overview", pa.binary()),  # likewise: one JPEG
        pa.field("mask", pa.binary()),  # likewise: where the tissue is, a PNG of one bit a px
        pa.field("slides", pa.binary()),  # in a batch's first row: what each slide's commit says, JSON by zlib
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
        pa.field("part", pa.int32(), nullable=False),  # its number; the metadata's ips.parts are the files' names
        pa.field("offset", pa.int64(), nullable=False),  # absolute byte offset of the JPEG in the part
        pa.field("length", pa.int64(), nullable=False),  # its length in bytes, with its surroundings
    ],
    metadata=_META,
)

MEASURED = INDEX.append(
    pa.field("sharpness", pa.float32(), nullable=False)  # variance of the patch's Laplacian (`tiling.min_sharpness`)
)

CATALOGUE = pa.schema(
    [
        pa.field("id", pa.binary(16), nullable=False),  # of this row alone; of a removal: of the row that is removed
        pa.field("kind", pa.string(), nullable=False),  # source, slide or removal
        pa.field("key", pa.string()),  # of the slide; null of a source that gave none
        # of a source: one version of one file, with what is given beside it
        pa.field("asked", pa.string()),  # digest of all that is asked for: the next eight columns
        pa.field("uri", pa.string()),
        pa.field("given_mpp", pa.float64()),  # the cohort's override
        pa.field("mask", pa.string()),
        pa.field("coords", pa.string()),
        pa.field("series", pa.int64()),
        pa.field("size", pa.int64()),  # bytes
        pa.field("etag", pa.string()),
        pa.field("mtime", pa.float64()),  # seconds since the epoch
        pa.field("status", pa.string()),  # committed or quarantined
        pa.field("reason", pa.string()),
        pa.field("error", pa.string()),  # traceback
        pa.field("picture", pa.string()),  # of a quarantined slide in small, a JPEG in base64
        pa.field("max_seconds", pa.float64()),  # what was not enough for it
        pa.field("max_gib", pa.float64()),
        pa.field("left", pa.string()),  # key under which a slide that was given up left files
        pa.field("n_patches", pa.int64()),  # of sources and slides
        pa.field("n_bad_tiles", pa.int64()),
        # of a slide: the fields of `StoredSlide`
        pa.field("patch_px", pa.int64()),
        pa.field("level", pa.int64()),
        pa.field("downsample", pa.float64()),
        pa.field("stride", pa.float64()),
        pa.field("mpp", pa.float64()),
        pa.field("width", pa.int64()),
        pa.field("height", pa.int64()),
        pa.field("thumbnail_scale", pa.float64()),
        pa.field("imported", pa.bool_()),
        pa.field("context_mpp", pa.float64()),  # of each patch's second JPEG; null: there is none
        pa.field("dim", pa.int64()),  # of features: numbers a patch
        pa.field("dtype", pa.string()),
        pa.field("pack", pa.string()),  # name of the pack that holds the slide; null: a folder of its own
        pa.field("place", pa.string()),  # JSON: where in the pack
        pa.field("facts", pa.string()),  # JSON: what slide.json says
    ],
    metadata=_META,
)

_LOOK = {
    "source": (
        "id", "key", "asked", "uri", "status", "reason", "max_seconds", "max_gib", "left", "n_patches", "n_bad_tiles",
    ),
    "slide": (
        "id", "key", "n_patches", "n_bad_tiles", "patch_px", "level", "downsample", "stride", "mpp", "width", "height",
        "thumbnail_scale", "imported", "context_mpp", "dim", "dtype", "pack", "place",
    ),
    "removal": ("id",),
}  # fmt: skip
_REPEATED = {name: pa.field(name, pa.dictionary(pa.int32(), pa.string())) for name in ("status", "dtype", "pack")}
LOOK = {
    kind: pa.schema([_REPEATED.get(name) or CATALOGUE.field(name) for name in names]) for kind, names in _LOOK.items()
}
"""Columns of each kind of row of the catalogue that a look reads; of the others some have KB a row.

Text that many rows share is held once: of a million slides the names of their packs took 79 MiB.
"""

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

SLIDE_LEDGER = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # committed or quarantined
        pa.field("reason", pa.string()),  # the category that slides are counted by
        pa.field("message", pa.string()),
        pa.field("traceback", pa.string()),
        pa.field("key", pa.string()),  # of the stored slide; the following ones come from its commit
        pa.field("content", pa.string()),  # sha256 over what identifies the slide
        pa.field("vendor", pa.string()),
        pa.field("mpp", pa.float64()),  # microns per level-0 px
        pa.field("width", pa.int64()),  # level-0 px
        pa.field("height", pa.int64()),
        pa.field("level", pa.int32()),  # pyramid level that was read
        pa.field("n_patches", pa.int64(), nullable=False),
        pa.field("n_bad_tiles", pa.int64(), nullable=False),
        pa.field("rejects", pa.string(), nullable=False),  # JSON: reason -> places that are no patches
        pa.field("tissue", pa.float64()),  # share of the slide
        pa.field("tissue_beyond", pa.float64()),  # share of the tissue that lies beyond the last patches
    ],
    metadata=_META,
)

FILE_LEDGER = pa.schema(
    [
        pa.field("role", pa.string(), nullable=False),  # source, or stored
        pa.field("uri", pa.string(), nullable=False),
        pa.field("slide_id", pa.string()),  # of a source; several rows of a cohort may share a stored slide
        pa.field("key", pa.string()),
        pa.field("bytes", pa.int64()),  # with all companions of a slide of several files
        pa.field("etag", pa.string()),
        pa.field("mtime", pa.float64()),  # seconds since the epoch
        pa.field("sha256", pa.string()),
        pa.field("patches", pa.int64()),  # in a part
    ],
    metadata=_META,
)

CORRUPTION_LEDGER = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("key", pa.string()),  # null where the whole slide is lost
        pa.field("kind", pa.string(), nullable=False),  # bad-tile, or the reason of a broken slide
        pa.field("message", pa.string()),
        pa.field("level", pa.int32()),
        pa.field("x", pa.int64()),  # level-0 px of the lost patch
        pa.field("y", pa.int64()),
        pa.field("edge", pa.int64()),  # level-0 px
    ],
    metadata=_META,
)

SWEEP_ROWS = pa.schema(
    [
        pa.field("scoring", pa.string(), nullable=False),  # digest of model and setting
        pa.field("source", pa.string(), nullable=False),  # digest of the slide's place, version and what is beside it
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("key", pa.string()),  # of the tiled slide; null where there is none
        pa.field("content", pa.string()),  # sha256 over what identifies the slide
        pa.field("outputs", pa.list_(pa.float64())),  # of all tasks, one after the other; null where it failed
        pa.field("patches_scored", pa.int64(), nullable=False),
        pa.field("patches_total", pa.int64(), nullable=False),
        pa.field("n_bad_tiles", pa.int64(), nullable=False),
        pa.field("precision", pa.string(), nullable=False),
        pa.field("seed", pa.int64()),  # null where nothing is drawn
        pa.field("seconds", pa.float64(), nullable=False),  # of this model alone
        pa.field("read_seconds", pa.float64(), nullable=False),  # waited for patches, for all models that shared them
        pa.field("bytes_read", pa.int64(), nullable=False),  # of patches, for all models that shared them
        pa.field("peak_bytes", pa.int64(), nullable=False),  # of device memory, else of the process's
        pa.field("device", pa.string(), nullable=False),
        pa.field("reason", pa.string()),  # the category of a failure
        pa.field("message", pa.string()),
        pa.field("finished", pa.float64(), nullable=False),  # s since 1970
    ],
    metadata=_META,
)
