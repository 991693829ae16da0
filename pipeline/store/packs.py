"""Packs: the patches of many small slides in one file, which can tell all that is known of them.

`<root>/<spec fingerprint>/packs/pack-<sha256>.arrow` is an uncompressed Arrow IPC file (schema PACK), named by its
bytes. The rows of a slide stand in one batch, one after another, and so do its JPEGs: any patch is one range read of
exactly its bytes, and so is any run of neighbours. A slide's first row also holds its index, as small integers, and
what is kept to be looked at. A batch's first row holds what `slide.json` says of a slide that has a folder of its own.
Where in the file a slide is (`Place`) stands in the catalogue; `read_pack` finds it again from the bytes alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import DamagedError
from pipeline.schema import PACK, PATCHES
from pipeline.storage import files
from pipeline.store.parts import BATCH_PATCHES

PACKS = "packs"
"""Folder beside those of slides."""
PACK_BYTES = 2**25  # of JPEGs: a task holds one pack, and writing it takes as much again twice

_PLANNED = 6  # numbers a patch in the index of a plan
_NAME = re.compile(r"^pack-([0-9a-f]{64})\.arrow$")

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class SmallSlide:
    """A slide that is to be packed. Picklable."""

    facts: Mapping[str, Any]
    """As `slide.json` has them, with `key`, `level` and `n_patches`; JSON."""
    patches: pa.RecordBatch
    """Schema PATCHES, all rows; of a plan the images are empty."""
    overview: bytes
    """A JPEG."""
    mask: bytes
    """A PNG."""
    corners: Ints | None = None
    """Of a plan: (n, 2) left and top of each patch, px of the level that is read."""

    @property
    def key(self) -> str:
        """Names the slide."""
        return str(self.facts["key"])

    @property
    def bytes(self) -> int:
        """Of its JPEGs."""
        return int(self.patches.column("image").nbytes)


@dataclass(frozen=True)
class Place:
    """Where in a pack a slide is: all that reading it needs."""

    first: int
    """Absolute offset of its first JPEG; the others follow without gaps."""
    index: int
    """Absolute offset of its index, int32 of (n, 4), of a plan (n, 6)."""
    overview: int
    overview_bytes: int
    mask: int
    mask_bytes: int
    facts: int
    """Absolute offset of what the commits of its batch say."""
    facts_bytes: int
    number: int
    """In its batch."""
    planned: bool = False
    """Whether it is a plan, without JPEGs."""

    @property
    def index_width(self) -> int:
        """Columns of the index: cell, x, y, length; of a plan also left and top."""
        return _PLANNED if self.planned else 4

    def json(self) -> str:
        """For the catalogue."""
        return json.dumps(list(astuple(self)), separators=(",", ":"))

    @classmethod
    def of(cls, text: str) -> Place:
        """What `json` gave."""
        return cls(*json.loads(text))


@dataclass(frozen=True)
class Pack:
    """A pack's bytes, and where in them each slide is, in order."""

    name: str
    """Of its file."""
    data: bytes
    places: Mapping[str, Place]
    """By key."""


def pack_name(data: bytes) -> str:
    """File name of a pack with these bytes."""
    return f"pack-{hashlib.sha256(data).hexdigest()}.arrow"


def pack_sha256(name: str) -> str:
    """Digest of the bytes of a pack of this name."""
    return name.removeprefix("pack-").removesuffix(".arrow")


def pack_uri(store: str, name: str) -> str:
    """Of a pack of a spec's store."""
    return files.join(store, PACKS, name)


def write_pack(slides: Sequence[SmallSlide]) -> Pack:
    """Put slides into one file; equal slides in equal order give equal bytes.

    Args:
        slides: at least one, each key once.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, PACK) as writer:
        for some in _batches(slides):
            writer.write_batch(_batch(some))
    data = bytes(sink.getvalue())
    return Pack(pack_name(data), data, {slide.key: place for slide, place in _found(data)})


def read_pack(uri: str) -> tuple[Pack, list[SmallSlide]]:
    """A pack from its file, with the slides in it.

    Raises:
        DamagedError: its bytes are not those that were written.
        StorageError: it cannot be read.
    """
    data, name = files.read_bytes(uri), uri.rpartition("/")[2]
    if pack_name(data) != name:
        raise DamagedError(f"{uri}: was changed: its sha256 is not that of its name; tile its slides again")
    found = list(_found(data))
    return Pack(name, data, {slide.key: place for slide, place in found}), [slide for slide, _ in found]


def without(slides: Sequence[SmallSlide], keys: Collection[str]) -> Pack | None:
    """The pack that the other slides make; None where none is left."""
    left = [slide for slide in slides if slide.key not in keys]
    return write_pack(left) if left else None


def read_facts(uri: str, place: Place) -> Mapping[str, Any]:
    """What the commit of a slide in a pack says. One range read.

    Raises:
        StorageError: the pack cannot be read.
    """
    (data,) = files.read_ranges(uri, [(place.facts, place.facts_bytes)])
    facts: Mapping[str, Any] = json.loads(zlib.decompress(data))[place.number]
    return facts


def is_pack(name: str) -> bool:
    """Whether a pack's file may have this name."""
    return _NAME.match(name) is not None


@lru_cache(maxsize=4096)  # slides: an epoch over many comes back to none, a batch's are few; up to 6 KB each
def read_index(uri: str, place: Place, n: int) -> Ints:
    """(n, 4) cell, x, y (level-0 px) and bytes of each patch of a slide; of a plan (n, 6), see `Place`. One range read.

    Args:
        uri: of the pack.
        place: of the slide in it.
        n: patches of the slide.

    Raises:
        StorageError: the pack cannot be read.
    """
    (data,) = files.read_ranges(uri, [(place.index, 4 * n * place.index_width)])
    return np.frombuffer(data, "<i4").reshape(n, place.index_width)


def _batches(slides: Sequence[SmallSlide]) -> Iterator[list[SmallSlide]]:
    """Whole slides, until they have the rows of a batch."""
    held: list[SmallSlide] = []
    rows = 0
    for slide in slides:
        held.append(slide)
        rows += len(slide.patches)
        if rows >= BATCH_PATCHES:
            yield held
            held, rows = [], 0
    if held:
        yield held


def _batch(slides: Sequence[SmallSlide]) -> pa.RecordBatch:
    patches = pa.Table.from_batches([slide.patches for slide in slides]).combine_chunks()
    counts = [len(slide.patches) for slide in slides]
    starts = np.cumsum([0, *counts[:-1]])
    records = json.dumps([slide.facts for slide in slides], sort_keys=True, separators=(",", ":"), allow_nan=False)
    columns = [column.chunk(0) for column in patches.columns]
    return pa.record_batch(
        [
            *columns,
            pa.array(np.repeat(np.arange(len(slides), dtype=np.int32), counts)),
            _at(starts, len(patches), [_index_bytes(slide) for slide in slides]),
            _at(starts, len(patches), [slide.overview for slide in slides]),
            _at(starts, len(patches), [slide.mask for slide in slides]),
            _at(starts[:1], len(patches), [zlib.compress(records.encode(), 9)]),
        ],
        schema=PACK,
    )


def _at(rows: npt.NDArray[np.int64], total: int, values: Sequence[bytes]) -> pa.Array:
    """A column of `total` rows with these values at `rows`, else null."""
    column: list[bytes | None] = [None] * total
    for row, value in zip(rows.tolist(), values, strict=True):
        column[row] = value
    return pa.array(column, pa.binary())


def _index_bytes(slide: SmallSlide) -> bytes:
    columns = [slide.patches.column(name).to_numpy() for name in ("cell", "x", "y")]
    bounds = _bounds(slide.patches.column("image"))
    index = np.stack([*columns, np.diff(bounds)], axis=1).astype("<i4")
    if slide.corners is not None:
        index = np.concatenate([index, slide.corners.astype("<i4")], axis=1)
    return index.tobytes()


def _bounds(images: pa.Array) -> npt.NDArray[np.int64]:
    """(n + 1,) offsets of each value of a column of large binaries in its buffer of values, and the end of the last."""
    offsets = np.frombuffer(images.buffers()[1], np.int64, len(images) + 1, 8 * images.offset)
    return np.asarray(offsets, np.int64)


def _found(data: bytes) -> Iterator[tuple[SmallSlide, Place]]:
    """The slides of a pack, and where they are; offsets come from the addresses that Arrow itself reads at."""
    buffer = pa.py_buffer(data)
    reader = pa.ipc.open_file(buffer)
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        owners = batch.column("slide").to_numpy()
        starts = np.searchsorted(owners, np.arange(owners[-1] + 2)).tolist()
        told = _span(batch.column("slides"), buffer)
        commits = json.loads(zlib.decompress(data[told]))
        for at, (facts, start, stop) in enumerate(zip(commits, starts[:-1], starts[1:], strict=True)):
            yield _slide(batch.slice(start, stop - start), facts, buffer, told, at)


def _slide(
    rows: pa.RecordBatch, facts: Mapping[str, Any], buffer: pa.Buffer, told: slice, number: int
) -> tuple[SmallSlide, Place]:
    """One slide's rows of a batch that is read in place; `told` is where the facts of all are, its own at `number`."""
    index, overview, mask = (_span(rows.column(name), buffer) for name in ("index", "overview", "mask"))
    numbers = np.frombuffer(buffer, "<i4", (index.stop - index.start) // 4, index.start).reshape(len(rows), -1)
    planned = numbers.shape[1] == _PLANNED
    patches = pa.record_batch([rows.column(field.name) for field in PATCHES], schema=PATCHES)
    data = memoryview(buffer)
    slide = SmallSlide(facts, patches, bytes(data[overview]), bytes(data[mask]), numbers[:, 4:] if planned else None)
    images = rows.column("image")
    place = Place(
        first=0 if planned else images.buffers()[2].address + int(_bounds(images)[0]) - buffer.address,
        index=index.start,
        overview=overview.start,
        overview_bytes=overview.stop - overview.start,
        mask=mask.start,
        mask_bytes=mask.stop - mask.start,
        facts=told.start,
        facts_bytes=told.stop - told.start,
        number=number,
        planned=planned,
    )
    return slide, place


def _span(column: pa.Array, buffer: pa.Buffer) -> slice:
    """Where in the file the first value of a column of binaries is."""
    _, offsets, values = column.buffers()
    start, stop = np.frombuffer(offsets, np.int32, 2, 4 * column.offset).tolist()
    if start == stop:  # of nothing there need be no buffer
        return slice(0, 0)
    first = values.address - buffer.address
    return slice(first + start, first + stop)
