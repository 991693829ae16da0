"""The patch store: what tiling commits, and exact reads of it.

`<root>/<spec fingerprint>/<slide key>/` holds `part-00000.arrow` (uncompressed Arrow IPC files), `index.parquet`,
`thumbnail.jpg` and `slide.json`, which is written last: a slide without it does not exist. All bytes follow from
the slide's content and the spec, so two writers of one slide write the same files and a lost race harms nothing.
`<root>/<spec fingerprint>/sources/` remembers for each source URI which version of it gave which slide, or why
it gave none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.cohort import CohortSlide
from pipeline.errors import StorageError
from pipeline.schema import INDEX, PATCHES, SCHEMA_VERSION
from pipeline.slide import SlideReader, tool_versions
from pipeline.storage import SourceVersion
from pipeline.tiling import PatchRow, SlideTiling

BATCH_PATCHES = 256  # a record batch: 8 to 15 MB of 256 px patches
PART_PATCHES = 8192
PART_BYTES = 64 * 2**20  # a part is built in memory: this bounds a tiling task, whatever the slide

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SlideStatus:
    """What became of one row of the cohort."""

    slide_id: str
    uri: str
    key: str | None
    """The stored slide; None when quarantined."""
    status: Literal["committed", "quarantined"]
    reason: str | None = None
    """Short category, then the message; None when committed."""
    n_patches: int = 0
    n_bad_tiles: int = 0
    error: str | None = None
    """Traceback."""


@dataclass(frozen=True)
class PatchIndex:
    """Where each patch stands, in the slide and in the store. Arrays of length n, by row."""

    x: Ints
    """Level-0 px of the patch's left edge."""
    y: Ints
    """Level-0 px of its upper edge."""
    part: Ints
    offset: Ints
    """Absolute byte offset of the JPEG in its part."""
    length: Ints


@dataclass(frozen=True)
class StoredSlide:
    """A committed slide. Small, picklable; patches and index are read when asked for."""

    uri: str
    """Folder of the slide in the store."""
    key: str
    n_patches: int
    n_bad_tiles: int
    """Patches that could not be decoded, and are not among the `n_patches`."""
    patch_px: int
    level: int
    """Pyramid level that was read."""
    downsample: float
    """Level-0 px per patch px."""
    stride: float
    """Level-0 px from one grid column or row to the next."""
    mpp: float | None
    """Microns per level-0 px; None when level 0 was read as it is."""
    dimensions: tuple[int, int]
    """Width and height of the slide, level-0 px."""
    thumbnail_scale: float
    """Level-0 px per px of the thumbnail."""

    @property
    def extent(self) -> float:
        """Edge of a patch, in level-0 px."""
        return self.downsample * self.patch_px

    def index(self) -> PatchIndex:
        """Position and place of every patch; the last few slides' are kept in memory."""
        return _read_index(self.uri)

    def positions(self) -> Ints:
        """(n, 2) grid column and row of every patch."""
        index = self.index()
        return np.rint(np.stack([index.x, index.y], axis=1) / self.stride).astype(np.int64)

    def payloads(self, rows: Sequence[int] | Ints) -> list[bytes]:
        """The JPEGs of `rows`, in their order: one range read for each run of neighbours, exactly its bytes."""
        index, wanted = self.index(), np.asarray(rows, np.int64)
        found: dict[int, bytes] = {}
        for part in np.unique(index.part[wanted]).tolist():
            members = np.unique(wanted[index.part[wanted] == part])
            runs = _runs(index, members)
            ranges = [
                (int(index.offset[run[0]]), int(index.offset[run[-1]] + index.length[run[-1]] - index.offset[run[0]]))
                for run in runs
            ]
            for run, data in zip(runs, storage.read_ranges(self._part(part), ranges), strict=True):
                start = index.offset[run[0]]
                for row in run.tolist():
                    first = int(index.offset[row] - start)
                    found[row] = data[first : first + int(index.length[row])]
        return [found[row] for row in wanted.tolist()]

    def thumbnail(self) -> bytes:
        """The slide's thumbnail, a JPEG of at most 512 px."""
        return storage.read_bytes(storage.join(self.uri, "thumbnail.jpg"))

    def _part(self, number: int) -> str:
        return storage.join(self.uri, part_name(number))


class PatchStore:
    """The slides tiled with one spec."""

    def __init__(self, root: str, spec_fingerprint: str) -> None:
        self.uri = storage.join(root, spec_fingerprint)

    def status(self, slide: CohortSlide, version: SourceVersion) -> SlideStatus | None:
        """What became of this version of the source; None when it was never tiled or its slide is gone."""
        pointer = self._pointer(slide)
        if not storage.exists(pointer):
            return None
        record = storage.read_json(pointer)
        if record["version"] != asdict(version):
            return None
        status = SlideStatus(slide.slide_id, slide.uri, **record["status"])
        if status.key is not None and not self.has(status.key):
            return None
        return status

    def record(self, slide: CohortSlide, version: SourceVersion, status: SlideStatus) -> None:
        """Remember what became of this version of the source."""
        outcome = {name: value for name, value in asdict(status).items() if name not in {"slide_id", "uri"}}
        source = {"uri": slide.uri, "mpp": slide.mpp}
        storage.write_json(self._pointer(slide), {"source": source, "version": asdict(version), "status": outcome})

    def has(self, key: str) -> bool:
        """Whether the slide is committed."""
        return storage.exists(storage.join(self.uri, key, "slide.json"))

    def slide(self, key: str) -> StoredSlide:
        """A committed slide.

        Raises:
            StorageError: it is not committed here.
        """
        uri = storage.join(self.uri, key)
        if not self.has(key):
            raise StorageError(f"{uri}: no committed slide (slide.json is absent); run the tile stage")
        facts = storage.read_json(storage.join(uri, "slide.json"))
        names = ("n_patches", "n_bad_tiles", "patch_px", "level", "downsample", "stride", "mpp")
        values = {name: facts[name] for name in names}
        return StoredSlide(
            uri=uri,
            key=key,
            dimensions=tuple(facts["dimensions"]),
            thumbnail_scale=facts["thumbnail"]["scale"],
            **values,
        )

    def write(
        self, digest: str, mpp: float | None, reader: SlideReader, tiling: SlideTiling, rows: Iterator[PatchRow]
    ) -> StoredSlide:
        """Tile an open slide into the store and commit it.

        Args:
            digest: of the slide's content (`identity.slide_digest`).
            mpp: microns per level-0 px the tiling was planned with.
            reader: the open slide, for its facts.
            tiling: its planned patches.
            rows: `tiling.rows()`, not yet iterated.

        Raises:
            SlideError: the slide turned out unusable; nothing is committed.
            StorageError: the store cannot be written.
        """
        key = slide_key(digest, mpp)
        uri = storage.join(self.uri, key)
        index, parts = [], []
        for number, (part, first) in enumerate(_parts(rows)):
            data = _part_bytes(part, first)
            storage.write_bytes(storage.join(uri, part_name(number)), data)
            index.append(_part_index(data, number))
            parts.append(_digest(part_name(number), data, len(part)))
        table = _parquet(pa.concat_tables(index))
        storage.write_bytes(storage.join(uri, "index.parquet"), table)
        storage.write_bytes(storage.join(uri, "thumbnail.jpg"), tiling.thumbnail.jpeg)
        facts = {
            "schema_version": SCHEMA_VERSION,
            "key": key,
            "content": digest,
            "mpp": mpp,
            **_slide_facts(reader),
            **_tiling_facts(tiling),
            "parts": parts,
            "index": _digest("index.parquet", table, sum(part["patches"] for part in parts)),
            "tools": tool_versions(),
        }
        storage.write_json(storage.join(uri, "slide.json"), facts)
        return self.slide(key)

    def _pointer(self, slide: CohortSlide) -> str:
        source = json.dumps([slide.uri, slide.mpp])
        return storage.join(self.uri, "sources", hashlib.sha256(source.encode()).hexdigest() + ".json")


def slide_key(digest: str, mpp: float | None) -> str:
    """Name of a slide in the store: its content and the microns per px it is taken to have."""
    return hashlib.sha256(json.dumps([digest, mpp]).encode()).hexdigest()[:32]


def part_name(number: int) -> str:
    """File name of a part."""
    return f"part-{number:05d}.arrow"


def _parts(rows: Iterator[PatchRow]) -> Iterator[tuple[list[PatchRow], int]]:
    """Cut the rows into parts; with each, the number of its first row."""
    part: list[PatchRow] = []
    first = size = 0
    for row in rows:
        part.append(row)
        size += len(row.image)
        if len(part) == PART_PATCHES or size >= PART_BYTES:
            yield part, first
            first, size, part = first + len(part), 0, []
    if part:
        yield part, first


def _part_bytes(rows: Sequence[PatchRow], first: int) -> bytes:
    """An Arrow IPC file of the rows, numbered from `first`."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, PATCHES) as writer:
        for start in range(0, len(rows), BATCH_PATCHES):
            batch = rows[start : start + BATCH_PATCHES]
            columns = [
                range(first + start, first + start + len(batch)),
                [row.x for row in batch],
                [row.y for row in batch],
                [row.level for row in batch],
                [row.image for row in batch],
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, PATCHES, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=PATCHES))
    return bytes(sink.getvalue())


def _part_index(data: bytes, number: int) -> pa.Table:
    """The index rows of one part; offsets come from the addresses Arrow itself reads the images at."""
    buffer = pa.py_buffer(data)
    reader = pa.ipc.open_file(buffer)
    batches = []
    for i in range(reader.num_record_batches):
        batch = reader.get_batch(i)
        _, offsets, images = batch.column("image").buffers()
        bounds = np.frombuffer(offsets, np.int64, len(batch) + 1) + (images.address - buffer.address)
        arrays = [
            *(batch.column(name) for name in ("row", "x", "y", "level")),
            pa.array(np.full(len(batch), number, np.int32)),
            pa.array(bounds[:-1]),
            pa.array(np.diff(bounds)),
        ]
        batches.append(pa.record_batch(arrays, schema=INDEX))
    return pa.Table.from_batches(batches, schema=INDEX)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def _digest(name: str, data: bytes, patches: int) -> dict[str, Any]:
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "patches": patches}


def _slide_facts(reader: SlideReader) -> Mapping[str, Any]:
    return {
        "vendor": reader.vendor,
        "stated_mpp": reader.mpp,
        "dimensions": list(reader.dimensions),
        "levels": [[level.width, level.height, level.downsample] for level in reader.levels],
    }


def _tiling_facts(tiling: SlideTiling) -> Mapping[str, Any]:
    grid, thumbnail, lost = tiling.grid, tiling.thumbnail, len(tiling.bad_tiles)
    return {
        "spec": tiling.spec.model_dump(mode="json", exclude={"max_bad_slides", "cpus"}),
        "level": grid.level,
        "read_px": grid.read_px,
        "patch_px": grid.patch_px,
        "downsample": grid.scale,
        "stride": grid.stride_px * grid.downsample,
        "grid": [grid.columns, grid.rows],
        "n_patches": len(tiling.cells) - lost,
        "rejects": {"tissue": tiling.n_grid - len(tiling.cells), "bad-tile": lost},
        "n_bad_tiles": lost,
        "bad_tiles": tiling.bad_tiles,
        "thumbnail": {"width": thumbnail.width, "height": thumbnail.height, "scale": thumbnail.scale},
    }


@lru_cache(maxsize=8)  # slides: a batch comes back to the same few; 40 bytes a patch each
def _read_index(uri: str) -> PatchIndex:
    table = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(uri, "index.parquet"))))
    return PatchIndex(*(table.column(name).to_numpy().astype(np.int64) for name in PatchIndex.__annotations__))


def _runs(index: PatchIndex, rows: Ints) -> list[Ints]:
    """Cut ascending rows of one part where the next patch does not start at the end of the one before."""
    ends = index.offset[rows] + index.length[rows]
    return np.split(rows, np.flatnonzero(index.offset[rows][1:] != ends[:-1]) + 1)
