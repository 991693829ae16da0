"""The patch store: which slides are committed, what became of each source, and exact reads.

`<root>/<spec fingerprint>/<slide key>/` holds `part-00000-1f0c46d2a9b3.arrow` (uncompressed Arrow IPC files, with the
start of their sha256 in the name), `index.parquet`, `thumbnail.jpg` and `slide.json`, which is written last: a slide
without it does not exist. All bytes follow from the slide's content, the spec and the image libraries: two writers of
one slide write the same files, or parts under other names, and a lost race harms nothing.
`<root>/<spec fingerprint>/sources/` remembers for each source URI which version of it gave which slide, or why
it gave none; `unfinished/` which parts are whole of a slide that several tasks share, until it is committed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cohort.table import CohortSlide
from pipeline.config.base import fingerprint
from pipeline.errors import StorageError
from pipeline.schema import SCHEMA_VERSION
from pipeline.storage import files
from pipeline.storage.files import SourceVersion
from pipeline.storage.tree import delete_folder
from pipeline.store.parts import file_name
from pipeline.tiling.grid import cells_at

SOURCES, UNFINISHED = "sources", "unfinished"
"""Folders beside those of the slides."""
PLANS = "plans"
"""Folder below the root: a store of slides without parts (`commit.write_plan`)."""

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
    picture: str | None = None
    """A quarantined slide in small, a JPEG in base64, where it was seen before it was given up."""
    limits: tuple[float, float] | None = None
    """Where it was too expensive: the `tiling.max_seconds` and `tiling.max_slide_gib` that were not enough."""


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
    imported: bool
    """Its patches stand where a file said, not on a grid."""

    @property
    def extent(self) -> float:
        """Edge of a patch, in level-0 px."""
        return self.downsample * self.patch_px

    def index(self) -> PatchIndex:
        """Position and place of every patch; the last few slides' are kept in memory."""
        return _read_index(self.uri, self.n_patches)[0]

    def positions(self, rows: Ints) -> Ints:
        """(n, 2) grid column and row of `rows` (n,); of imported patches in strides from the corner, rounded."""
        index = self.index()
        corners = np.stack([index.x[rows], index.y[rows]], axis=1)
        if not self.imported:
            return cells_at(corners, self.stride)
        nearest: Ints = np.rint(corners / self.stride).astype(np.int64)
        return nearest

    def payloads(self, rows: Sequence[int] | Ints) -> list[bytes]:
        """The JPEGs of `rows`, in their order: one range read for each run of neighbours, exactly its bytes."""
        (index, schema), wanted = _read_index(self.uri, self.n_patches), np.asarray(rows, np.int64)
        found: dict[int, bytes] = {}
        for part in np.unique(index.part[wanted]).tolist():
            members = np.unique(wanted[index.part[wanted] == part])
            runs = _runs(index, members)
            ranges = [
                (int(index.offset[run[0]]), int(index.offset[run[-1]] + index.length[run[-1]] - index.offset[run[0]]))
                for run in runs
            ]
            file = files.join(self.uri, file_name(schema, part))
            for run, data in zip(runs, files.read_ranges(file, ranges), strict=True):
                start = index.offset[run[0]]
                for row in run.tolist():
                    first = int(index.offset[row] - start)
                    found[row] = data[first : first + int(index.length[row])]
        return [found[row] for row in wanted.tolist()]

    def thumbnail(self) -> bytes:
        """The slide's thumbnail, a JPEG of at most 512 px."""
        return files.read_bytes(files.join(self.uri, "thumbnail.jpg"))


class PatchStore:
    """The slides tiled with one spec."""

    def __init__(self, root: str, spec_fingerprint: str) -> None:
        self.uri = files.join(root, spec_fingerprint)
        self.spec_fingerprint = spec_fingerprint

    def status(self, slide: CohortSlide, version: SourceVersion) -> SlideStatus | None:
        """What became of this version of the source; None when it was never tiled or its slide is gone."""
        pointer = self._pointer(slide)
        if not files.exists(pointer):
            return None
        record = files.read_json(pointer)
        if record["version"] != asdict(version):
            return None
        outcome = record["status"]
        if "limits" in outcome:
            outcome = {**outcome, "limits": tuple(outcome["limits"])}
        status = SlideStatus(slide.slide_id, slide.uri, **outcome)
        if status.key is not None and not self.has(status.key):
            return None
        return status

    def source_version(self, slide: CohortSlide) -> Mapping[str, Any]:
        """The version of the source that was last looked at (fields of `SourceVersion`); empty when none was."""
        pointer = self._pointer(slide)
        version: Mapping[str, Any] = files.read_json(pointer)["version"] if files.exists(pointer) else {}
        return version

    def record(self, slide: CohortSlide, version: SourceVersion, status: SlideStatus, left: str | None = None) -> None:
        """Remember what became of this version of the source, and the key under which a slide given up left files."""
        outcome = {name: value for name, value in asdict(status).items() if name not in {"slide_id", "uri"}}
        for name in ("picture", "limits"):
            if outcome[name] is None:
                del outcome[name]
        source = {name: getattr(slide, name) for name in ("uri", "mpp", "mask", "coords", "series")}
        if slide.mpp is not None and not math.isfinite(slide.mpp):  # which JSON has not
            source["mpp"] = str(slide.mpp)
        record = {"source": source, "version": asdict(version), "status": outcome, "left": left}
        files.write_json(self._pointer(slide), record)

    def has(self, key: str) -> bool:
        """Whether the slide is committed."""
        return files.exists(files.join(self.uri, key, "slide.json"))

    def distrust(self, key: str) -> None:
        """Remove a plan that names patches which cannot be decoded; the next plan of the slide leaves them out."""
        files.write_bytes(self._distrusted(key), b"a patch of this slide cannot be decoded\n")
        delete_folder(files.join(self.uri, key))

    def is_distrusted(self, key: str) -> bool:
        """Whether the slide's patches must be read before they are planned."""
        return files.exists(self._distrusted(key))

    def facts(self, key: str) -> Mapping[str, Any]:
        """All that a slide's commit says.

        Raises:
            StorageError: it is not committed here.
        """
        uri = files.join(self.uri, key)
        if not self.has(key):
            raise StorageError(f"{uri}: no committed slide (slide.json is absent); run the tile stage")
        facts: Mapping[str, Any] = files.read_json(files.join(uri, "slide.json"))
        return facts

    def slide(self, key: str) -> StoredSlide:
        """A committed slide.

        Raises:
            StorageError: it is not committed here, or was cut by another spec.
        """
        uri = files.join(self.uri, key)
        facts = self.facts(key)
        spec = fingerprint({"schema": SCHEMA_VERSION, "tiling": facts["spec"]})
        if spec != self.spec_fingerprint:
            raise StorageError(
                f"{uri}: its patches were cut by another tiling spec ({spec}), so it was copied or renamed to here; "
                "remove the folder and run again, which tiles the slide anew"
            )
        names = ("n_patches", "n_bad_tiles", "patch_px", "level", "downsample", "stride", "mpp")
        values = {name: facts[name] for name in names}
        return StoredSlide(
            uri=uri,
            key=key,
            dimensions=tuple(facts["dimensions"]),
            thumbnail_scale=facts["thumbnail"]["scale"],
            imported=facts["grid"] is None,
            **values,
        )

    def _distrusted(self, key: str) -> str:
        return files.join(self.uri, UNFINISHED, key, "damaged")

    def _pointer(self, slide: CohortSlide) -> str:
        source = [slide.uri, slide.mpp, slide.mask, slide.coords, slide.series]  # one file may be several slides
        return files.join(self.uri, SOURCES, hashlib.sha256(json.dumps(source).encode()).hexdigest() + ".json")


def slide_key(digest: str, mpp: float | None, guide: str | None = None, series: int | None = None) -> str:
    """Name of a slide in the store.

    Args:
        digest: of its content.
        mpp: microns per px that it is taken to have.
        guide: digest of the mask and coordinates that say where its patches are.
        series: which image of the file it is, where the file alone does not say (`SlideReader.series`).
    """
    identity = [digest, mpp, guide, series]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


@lru_cache(maxsize=8)  # slides: a batch comes back to the same few; 40 bytes a patch each
def _read_index(uri: str, _n: int) -> tuple[PatchIndex, pa.Schema]:  # a plan that is made anew has fewer
    table = pq.read_table(pa.BufferReader(files.read_bytes(files.join(uri, "index.parquet"))))
    columns = (table.column(name).to_numpy().astype(np.int64) for name in PatchIndex.__annotations__)
    return PatchIndex(*columns), table.schema


def _runs(index: PatchIndex, rows: Ints) -> list[Ints]:
    """Cut ascending rows of one part where the next patch does not start at the end of the one before."""
    ends = index.offset[rows] + index.length[rows]
    return np.split(rows, np.flatnonzero(index.offset[rows][1:] != ends[:-1]) + 1)
