"""One part of a stored slide: which of the slide's cells it holds, its bytes, and where in them each patch stands.

Part k holds the patches of cells [k * P, (k + 1) * P) of the slide's plan, less those that cannot be decoded; P
follows from the edge of a patch alone. So a part depends on the slide and the spec, and not on which task wrote it,
on how many tasks shared the slide, or on what was lost elsewhere. Its file is named by its bytes, and the slide's index
holds the names: what it points at stays what it was, whoever writes beside it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.schema import INDEX, MEASURED, PATCHES
from pipeline.slides.identity import reading_source
from pipeline.tiling.sharpness import histogram
from pipeline.tiling.slide import PatchRow, SlideTiling

BATCH_PATCHES = 256  # a record batch: 3 to 15 MB of 256 px patches
PART_PX = 2**26  # 1024 patches of 256 px: 10 to 60 MB of JPEG; a task holds one part, whatever the slide's size
MAX_PART_PATCHES = 8192
BLURRIEST = 6  # patches that a commit names, to be looked at
_ROW_GROUP = 32_768  # rows of an index encoded together: 250,000 at once took 22 MB
NAMES = b"ips.parts"
"""Key of an index's metadata: names of the parts' files (JSON), in order."""


@dataclass(frozen=True)
class Part:
    """What is known of a written part."""

    name: str
    bytes: int
    sha256: str
    patches: int
    bad_tiles: tuple[tuple[int, int], ...]
    """Level-0 x, y of the cells that could not be decoded."""
    index: pa.Table
    """Schema INDEX, or MEASURED where sharpness was asked for; `row` counts from 0 in the part."""
    blurred: tuple[int, ...] | None = None
    """Cells that were too blurred, by sharpness in the bins of `tiling.sharpness`; None where it was not asked for."""

    def facts(self) -> dict[str, Any]:
        """The part's entry in the slide's commit."""
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256, "patches": self.patches}


def part_name(number: int) -> str:
    """File name of a part that only one kind of bytes can have."""
    return f"part-{number:05d}.arrow"


def content_name(number: int, sha256: str) -> str:
    """File name of a part by its bytes: no writer of others can put them in their place.

    Others come from another libjpeg, from another copy of a slide whose digest is of samples, or, of features, from
    another kind of device.
    """
    return f"part-{number:05d}-{sha256[:12]}.arrow"


def part_patches(patch_px: int) -> int:
    """Cells of a part (P)."""
    return max(1, min(MAX_PART_PATCHES, PART_PX // patch_px**2))


def part_count(tiling: SlideTiling) -> int:
    """Parts that a planned slide has."""
    return -(-len(tiling.cells) // part_patches(tiling.grid.patch_px))


def read_part(tiling: SlideTiling, number: int) -> tuple[bytes, Part]:
    """Read and encode one part of an open slide: the file's bytes, and what is to be known of it.

    Raises:
        SlideError: "bad-tiles", or the slide broke as a whole.
    """
    size = part_patches(tiling.grid.patch_px)
    start, stop = number * size, min((number + 1) * size, len(tiling.cells))
    lost_before, blurred_before = len(tiling.bad_tiles), len(tiling.blurred)
    measured: list[float | None] = []
    sink = pa.BufferOutputStream()
    rows = tiling.rows(start, stop)
    with reading_source(), pa.ipc.new_file(sink, PATCHES) as writer:
        while batch := list(itertools.islice(rows, BATCH_PATCHES)):
            writer.write_batch(record_batch(batch))
            measured += [row.sharpness for row in batch]
    data = bytes(sink.getvalue())
    index = part_index(data, number)
    bad_tiles = tuple((x, y) for x, y in tiling.bad_tiles[lost_before:])
    sha256 = hashlib.sha256(data).hexdigest()
    known = content_name(number, sha256), len(data), sha256, len(index), bad_tiles
    if tiling.spec.min_sharpness is None:
        return data, Part(*known, index)
    index = with_sharpness(index, measured)
    blurred = histogram(np.array(tiling.blurred[blurred_before:], np.float32))
    return data, Part(*known, index, tuple(blurred.tolist()))


def with_sharpness(index: pa.Table, values: Sequence[float | None]) -> pa.Table:
    """The index with a column more, of a value a row."""
    return index.append_column(MEASURED.field("sharpness"), pa.array(np.array(values, np.float32)))


def part_index(data: bytes, number: int) -> pa.Table:
    """The index of one part's bytes; offsets come from the addresses that Arrow itself reads the images at.

    Raises:
        pyarrow.ArrowInvalid: the bytes are no Arrow file.
    """
    buffer = pa.py_buffer(data)
    reader = pa.ipc.open_file(buffer)
    batches, row = [], 0
    for i in range(reader.num_record_batches):
        batch = reader.get_batch(i)
        _, offsets, images = batch.column("image").buffers()
        bounds = np.frombuffer(offsets, np.int64, len(batch) + 1) + (images.address - buffer.address)
        arrays = [
            pa.array(np.arange(row, row + len(batch), dtype=np.int64)),
            # copied: a column of the file would keep the whole part in memory, and a slide's parts add up to gigabytes
            *(pa.array(batch.column(name).to_numpy().copy()) for name in ("cell", "x", "y", "level")),
            pa.array(np.full(len(batch), number, np.int32)),
            pa.array(bounds[:-1]),
            pa.array(np.diff(bounds)),
        ]
        batches.append(pa.record_batch(arrays, schema=INDEX))
        row += len(batch)
    return pa.Table.from_batches(batches, schema=INDEX)


def sharpness_facts(
    tiling: SlideTiling, table: pa.Table, parts: Sequence[Part]
) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """What a commit says of the sharpness: how many patches had too little, and how it is spread; nothing if unasked.

    `blurred` and `kept` are counts by the bins of `tiling.sharpness`, less the empty ones behind.
    """
    if tiling.spec.min_sharpness is None:
        return {}, {}
    values = table.column("sharpness").to_numpy()
    left_out = histogram(np.array(tiling.blurred, np.float32))  # of a plan; parts have been read by other tasks
    if parts:
        left_out = np.sum([part.blurred or () for part in parts], axis=0)
    kept = histogram(values)
    order = np.argsort(values, kind="stable")[:BLURRIEST]
    known = {
        "median": round(float(np.median(values)), 3),
        "kept": np.trim_zeros(kept, "b").tolist(),
        "blurred": np.trim_zeros(left_out, "b").tolist(),
        "least": [[int(row), round(float(values[row]), 3)] for row in order],
    }
    return {"blurred": int(left_out.sum())}, {"sharpness": known}


def join_index(parts: Sequence[Part]) -> pa.Table:
    """The slide's index: its parts' one after another, rows counted through; it names their files."""
    table = pa.concat_tables([part.index for part in parts])
    table = table.set_column(0, INDEX.field("row"), pa.array(np.arange(len(table), dtype=np.int64)))
    return naming(table, [part.name for part in parts])


def naming(index: pa.Table, names: Sequence[str]) -> pa.Table:
    """The index with the names of its parts' files, in order, and those alone."""
    return index.replace_schema_metadata({**INDEX.metadata, NAMES: json.dumps(list(names)).encode()})


def file_name(index: pa.Schema, number: int) -> str:
    """The file of a part, by the slide's index; stores from before names had digests name none."""
    names = index.metadata.get(NAMES)
    return part_name(number) if names is None else str(json.loads(names)[number])


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file of the table; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP)
    return bytes(sink.getvalue())


def pack(part: Part) -> bytes:
    """A finished part's record for a slide that is not yet committed: its index, with the rest as metadata."""
    facts = {**part.facts(), "bad_tiles": part.bad_tiles}
    if part.blurred is not None:
        facts["blurred"] = part.blurred
    metadata = {**INDEX.metadata, b"ips.part": json.dumps(facts).encode()}
    return parquet_bytes(part.index.replace_schema_metadata(metadata))


def unpack(data: bytes) -> Part:
    """The part of a record that `pack` wrote."""
    table = pq.read_table(pa.BufferReader(data))
    facts = json.loads(table.schema.metadata[b"ips.part"])
    facts["bad_tiles"] = tuple((x, y) for x, y in facts["bad_tiles"])
    if "blurred" not in facts:
        return Part(**facts, index=table.cast(INDEX))
    facts["blurred"] = tuple(facts["blurred"])
    return Part(**facts, index=table.cast(MEASURED))


def record_batch(rows: Sequence[PatchRow]) -> pa.RecordBatch:
    """The rows in schema PATCHES."""
    columns = [
        [row.cell for row in rows],
        [row.x for row in rows],
        [row.y for row in rows],
        [row.level for row in rows],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, list(PATCHES)[:-1], strict=True)]
    return pa.record_batch([*arrays, binaries([row.image for row in rows])], schema=PATCHES)


def binaries(images: Sequence[bytes]) -> pa.Array:
    """The column of JPEGs; joined here, because Arrow's own conversion takes longer than all else of a patch."""
    ends = np.cumsum([0, *map(len, images)], dtype=np.int64)
    return pa.Array.from_buffers(
        PATCHES.field("image").type, len(images), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(images))]
    )
