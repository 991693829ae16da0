"""Writing a slide to the patch store: planned, its parts written by one task or by several, then committed.

Everything in a slide's folder follows from the slide's content and the spec, however the work was split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.base import fingerprint
from pipeline.errors import SlideError, StorageError
from pipeline.schema import INDEX, SCHEMA_VERSION
from pipeline.slides.identity import reading_source
from pipeline.slides.open import SlideReader, tool_versions
from pipeline.storage import files
from pipeline.storage.files import SourceVersion
from pipeline.store.index import Ints
from pipeline.store.parts import (
    Part,
    join_index,
    pack,
    parquet_bytes,
    part_count,
    part_patches,
    read_part,
    sharpness_facts,
    unpack,
    with_sharpness,
)
from pipeline.store.patches import UNFINISHED, PatchStore, StoredSlide, stored_slide
from pipeline.store.rows import slide_key
from pipeline.telemetry import spending
from pipeline.tiling.cutting import codec_fingerprint
from pipeline.tiling.evidence import THUMBNAIL
from pipeline.tiling.grid import PlacedGrid
from pipeline.tiling.slide import SlideTiling

RECORD_THREADS = 16  # requests of some KB each, which wait on the storage


@dataclass(frozen=True)
class PlannedSlide:
    """A slide whose patches are known and not yet read. Picklable, without the open slide."""

    key: str
    digest: str
    mpp: float | None
    facts: Mapping[str, Any]
    tiling: SlideTiling
    pictures: Mapping[str, bytes]
    """File name -> thumbnail and what is kept to be looked at; written with the commit."""
    codec: str
    """`cutting.codec_fingerprint` where it was planned."""
    version: SourceVersion | None
    """Of the file that was planned, where the digest is of samples; None: it is of every byte."""

    def attached(self, reader: SlideReader) -> PlannedSlide:
        """With the slide opened anew, so that its parts can be read."""
        return replace(self, tiling=self.tiling.attached(reader))

    def share(self, parts: range) -> PlannedSlide:
        """With what writing these parts needs of it."""
        size = part_patches(self.tiling.grid.patch_px)
        return replace(self, tiling=self.tiling.share(parts.start * size, parts.stop * size))

    @property
    def fingerprint(self) -> str:
        """Digest of what decides the parts' bytes beyond the spec: parts of another plan are not its parts."""
        cells = hashlib.sha256(np.ascontiguousarray(self.tiling.cells).tobytes()).hexdigest()
        version = None if self.version is None else asdict(self.version)
        return fingerprint({"cells": cells, "codec": self.codec, "version": version, **self.facts})

    def is_done(self, store: PatchStore) -> bool:
        """Whether the slide is committed, with nothing lost that this plan's file may have."""
        facts = store.written(self.key)
        return facts is not None and (self.version is None or facts["n_bad_tiles"] == 0)


def plan_slide(
    digest: str,
    mpp: float | None,
    reader: SlideReader,
    tiling: SlideTiling,
    guide: str | None = None,
    version: SourceVersion | None = None,
) -> PlannedSlide:
    """An open slide's patches, planned and not yet read.

    Args:
        digest: of the slide's content (`identity.slide_digest`).
        mpp: microns per level-0 px the tiling was planned with.
        reader: the open slide, for its facts.
        tiling: its planned patches.
        guide: digest of the mask and coordinates that were given beside it.
        version: of the slide's file, where the digest is of samples: parts of another version are not its parts.
    """
    facts = {**slide_facts(reader), **_tiling_facts(tiling), "tools": tool_versions(), "guide": guide}
    pictures = {THUMBNAIL: tiling.thumbnail.jpeg, **tiling.evidence.files}
    key = slide_key(digest, mpp, guide, reader.series)
    return PlannedSlide(key, digest, mpp, facts, tiling, pictures, codec_fingerprint(), version)


def write_pictures(store: PatchStore, planned: PlannedSlide) -> PlannedSlide:
    """Write a plan's pictures ahead of its parts; what is left of it travels to many tasks as some 10 KB."""
    for name, data in planned.pictures.items():
        files.write_bytes(files.join(store.uri, planned.key, name), data)
    return replace(planned, pictures={})


def write_slide(store: PatchStore, planned: PlannedSlide, unchanged: Callable[[], None]) -> StoredSlide:
    """Tile a planned slide into the store, whole, and commit it.

    Args:
        store: where to.
        planned: its tiling is attached to the open slide.
        unchanged: raises when the slide's file is no longer what it was; called before the commit.

    Raises:
        SlideError: the slide turned out unusable; nothing is committed.
        StorageError: the store cannot be written.
    """
    parts = [_write_part(store, planned, number) for number in range(part_count(planned.tiling))]
    unchanged()
    return _commit(store, planned, parts)


def write_plan(store: PatchStore, planned: PlannedSlide, unchanged: Callable[[], None]) -> StoredSlide:
    """Commit where a slide's patches are, without reading any: to a store of plans, whose slides have no parts.

    Only a slide of which a patch is known to be undecodable is read, to leave out the same patches as `write_slide`.
    The index names no part; `left` and `top` are the patch's corner in px of the level that is read. Arguments and
    errors as `write_slide`.
    """
    grid, tiling = planned.tiling.grid, planned.tiling
    numbers, corners, origins, sharp = planned_patches(tiling, distrusted=store.is_distrusted(planned.key))
    rows, nothing = np.arange(len(numbers)), np.zeros(len(numbers), np.int64)
    columns = [rows, numbers, *corners.T, nothing + grid.level, nothing - 1, nothing, nothing]
    arrays = [pa.array(column).cast(field.type) for column, field in zip(columns, INDEX, strict=True)]
    index = pa.table(arrays, schema=INDEX)
    for name, column in zip(("left", "top"), origins.T, strict=True):
        index = index.append_column(name, pa.array(column))
    if sharp is not None:
        index = with_sharpness(index, sharp)
    unchanged()
    return _commit(store, planned, [], index)


def planned_patches(tiling: SlideTiling, *, distrusted: bool) -> tuple[Ints, Ints, Ints, list[float] | None]:
    """(n,) cells, (n, 2) level-0 x, y, (n, 2) px of the level and sharpness of the patches that are not kept.

    Args:
        tiling: of an open slide.
        distrusted: they are read, to leave out those that cannot be; as they are to measure their sharpness.
    """
    grid = tiling.grid
    if distrusted or tiling.spec.min_sharpness is not None:
        with reading_source():
            found = [(row.cell, row.sharpness) for row in tiling.rows()]
        kept = np.array([cell for cell, _ in found], np.int64)
    else:
        kept = np.arange(len(tiling.cells))
    sharp = None if tiling.spec.min_sharpness is None else [value for _, value in found if value is not None]
    cells = tiling.cells[kept]
    return kept, grid.level0_origins(cells), grid.level_origins(cells), sharp


def write_share(store: PatchStore, planned: PlannedSlide, parts: Iterable[int], unchanged: Callable[[], None]) -> None:
    """Write some parts of a slide that several tasks share; those that a killed run left finished are kept.

    A part is recorded in `unfinished/` once it is whole, until the commit. Arguments and errors as `write_slide`;
    SlideError "codec" where this process would write other bytes than the one that planned the slide.
    """
    if planned.codec != codec_fingerprint():
        raise SlideError(
            "codec",
            f"this node's image libraries are not those of the node that planned the slide ({planned.facts['tools']}), "
            f"but {tool_versions()} or other builds; give all nodes one environment, and run again",
        )
    for number in parts:
        if _finished(store, planned, number) is None:
            part = _write_part(store, planned, number)
            unchanged()
            files.write_bytes(_record(store, planned, number), pack(part))


def commit_shares(store: PatchStore, planned: PlannedSlide) -> StoredSlide:
    """Commit a slide all of whose parts were written by `write_share`.

    Raises:
        SlideError: "bad-tiles", over all parts; "changed", what another job committed lost patches that this has.
        StorageError: a part's record is absent, or the store cannot be written.
    """
    numbers = range(part_count(planned.tiling))
    with ThreadPoolExecutor(RECORD_THREADS) as pool:
        if not planned.is_done(store):
            parts = list(pool.map(lambda number: _finished(store, planned, number), numbers))
            if None not in parts:
                _commit(store, planned, [part for part in parts if part is not None])
            elif store.written(planned.key) is None:  # else another job committed it meanwhile, and deleted the records
                raise StorageError(f"{store.uri}/unfinished/{planned.key}: a part's record is gone; run again")
        list(pool.map(lambda number: files.delete(_record(store, planned, number)), numbers))
    facts = store.written(planned.key)
    assert facts is not None  # it is not deleted while a stage is at work
    return stored_slide(store.uri, facts)


def drop_records(store: PatchStore, key: str) -> None:
    """Delete the records of a committed slide's parts, which a run leaves that is killed right after the commit."""
    folder = files.join(store.uri, UNFINISHED, key)
    for name in files.list_versions(folder):
        if name.startswith("part-"):
            files.delete(files.join(folder, name))


def _write_part(store: PatchStore, planned: PlannedSlide, number: int) -> Part:
    data, part = read_part(planned.tiling, number)
    with spending("write"):
        files.write_bytes(files.join(store.uri, planned.key, part.name), data)
    return part


def _finished(store: PatchStore, planned: PlannedSlide, number: int) -> Part | None:
    """What a task left of a part that is whole; None when it is to be written."""
    data = files.read_if_there(_record(store, planned, number))
    return None if data is None else unpack(data)


def _record(store: PatchStore, planned: PlannedSlide, number: int) -> str:
    return files.join(store.uri, UNFINISHED, planned.key, f"part-{number:05d}-{planned.fingerprint}.parquet")


def _commit(
    store: PatchStore,
    planned: PlannedSlide,
    parts: Sequence[Part],
    table: pa.Table | None = None,
) -> StoredSlide:
    """Write all but the parts, the commit last; `table` is the index of one without, whose tiling knows all losses."""
    uri = files.join(store.uri, planned.key)
    lost = planned.tiling.bad_tiles if table is not None else ()
    bad_tiles = [*lost, *(corner for part in parts for corner in part.bad_tiles)]
    planned.tiling.check_lost(len(bad_tiles))
    known = store.written(planned.key)
    if known is not None:
        return _committed(store, planned, known, bad_tiles)
    table = join_index(parts) if table is None else table
    planned.tiling.check_sharp(len(table))
    index = parquet_bytes(table)
    files.write_bytes(files.join(uri, "index.parquet"), index)
    write_pictures(store, planned)
    rejected, measured = sharpness_facts(planned.tiling, table, parts)
    facts = {
        **planned.facts,
        **measured,
        "schema_version": SCHEMA_VERSION,
        "key": planned.key,
        "content": planned.digest,
        "mpp": planned.mpp,
        "rejects": {**planned.facts["rejects"], **rejected, "bad-tile": len(bad_tiles)},
        "n_patches": len(table),
        "n_bad_tiles": len(bad_tiles),
        "bad_tiles": bad_tiles,
        "parts": [part.facts() for part in parts],
        "index": _file_facts("index.parquet", index),
    }
    files.write_json(files.join(uri, "slide.json"), facts)
    return stored_slide(store.uri, facts)


def _committed(
    store: PatchStore, planned: PlannedSlide, known: Mapping[str, Any], bad_tiles: Sequence[tuple[int, int]]
) -> StoredSlide:
    """What another task committed meanwhile; "changed" where its file, of the same samples, was a worse one."""
    lost = {(x, y) for x, y in known["bad_tiles"]} - set(bad_tiles)
    if planned.version is not None and lost:
        raise SlideError(
            "changed",
            f"{store.uri}/{planned.key}: stored meanwhile from a copy that lost {len(lost)} patches which this one "
            "has; run again",
        )
    return stored_slide(store.uri, known)


def slide_facts(reader: SlideReader) -> dict[str, Any]:
    """What a commit says of the slide itself."""
    return {
        "vendor": reader.vendor,
        "stated_mpp": None if reader.mpp is None else list(reader.mpp),
        "icc_profile": reader.profile,
        "dimensions": list(reader.dimensions),
        "bounds": list(reader.bounds),
        "series": reader.series,
        "image": None if reader.picked is None else asdict(reader.picked),
        "levels": [[level.width, level.height, level.downsample] for level in reader.levels],
    }


def _tiling_facts(tiling: SlideTiling) -> dict[str, Any]:
    facts = plan_facts(tiling)
    return {
        **facts,
        "evidence": dict(tiling.evidence.facts),
        "thumbnail": {**_file_facts(THUMBNAIL, tiling.thumbnail.jpeg), **facts["thumbnail"]},
        "files": [_file_facts(name, data) for name, data in tiling.evidence.files.items()],
    }


def plan_facts(tiling: SlideTiling) -> dict[str, Any]:
    """What a commit says of how the slide was tiled, and of the size of its thumbnail."""
    grid, thumbnail = tiling.grid, tiling.thumbnail
    height, width = thumbnail.rgb.shape[:2]
    return {
        "spec": tiling.spec.identity(),
        "level": grid.level,
        "read_px": grid.read_px,
        "patch_px": grid.patch_px,
        "downsample": grid.scale,
        "stride": grid.stride_px * grid.downsample,
        "grid": None if isinstance(grid, PlacedGrid) else [grid.columns, grid.rows],
        "rejects": dict(tiling.rejects),
        "thumbnail": {"width": width, "height": height, "scale": thumbnail.scale},
    }


def _file_facts(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
