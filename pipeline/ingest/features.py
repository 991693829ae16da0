"""The tile stage of a cohort whose features other tools have made: files are read once, whole, and stay where they lie.

What is committed of each is a plan (`store.patches.GIVEN`): the place of every patch on the slide, and of every vector
in the file, which is then read by ranges. Key and digests are those of the file's content. The slide itself is not
needed; a cohort's row stands for its file of features (`cohorts`).
"""

from __future__ import annotations

import hashlib
import io
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.formats.feature_files import FeatureFile, read_features
from pipeline.ingest.placing import Placed, place
from pipeline.ingest.source import unchanged
from pipeline.ingest.statuses import in_order, look_up, numbered
from pipeline.ingest.tiler import by_itself, outcome_of
from pipeline.ingest.versions import Looked, look_at
from pipeline.schema import INDEX, SCHEMA_VERSION
from pipeline.slides.identity import reading_source
from pipeline.storage import files
from pipeline.storage.files import SourceVersion
from pipeline.store.catalogue import Row
from pipeline.store.parts import parquet_bytes
from pipeline.store.patches import PatchStore, SlideStatus
from pipeline.store.rows import slide_key
from pipeline.tiling.evidence import OUTLINE, THUMBNAIL, THUMBNAIL_PX
from pipeline.tiling.geojson import collection
from pipeline.tiling.guide import Guide, read_guide

THREADS = 4  # files that are held in memory at a time, of up to a GB each
TOGETHER = 64  # slides that one file of the catalogue commits
_NOWHERE = collection([])
_GLASS, _PATCH = (250, 250, 250), (214, 176, 200)


def index_cohort(
    slides: Sequence[CohortSlide],
    spec: TilingConfig,
    store: str,
    *,
    on_status: Callable[[SlideStatus], None],
    versions: Sequence[Looked] | None = None,
) -> Sequence[SlideStatus]:
    """Index the files that the store does not know yet; statuses come back in the order of `slides`.

    Each file is read once, in threads here: what that takes is the storage's speed. Arguments and errors as
    `pipeline.ingest.graph.tile_cohort`.
    """
    versions = look_at(slides, spec) if versions is None else versions
    patches = PatchStore(store, spec.fingerprint())
    fresh = array("q")
    known = numbered(look_up(slides, versions, spec, patches, fresh))
    for status in known:
        on_status(status)
    if not fresh:
        return in_order(known)
    patches.forget_gone()  # what is made in their place may be otherwise

    def work(number: int) -> tuple[SlideStatus, list[Row]]:
        slide, version = slides[number], versions[number]
        assert isinstance(version, SourceVersion)
        return _indexed(slide, version, spec, patches)

    def indexed() -> Iterator[tuple[int, SlideStatus]]:
        with ThreadPoolExecutor(THREADS) as pool:
            for first in range(0, len(fresh), TOGETHER):
                some, rows = fresh[first : first + TOGETHER], list[Row]()
                try:
                    for number, (status, added) in zip(some, pool.map(work, some), strict=True):
                        rows += added
                        on_status(status)
                        yield number, status
                finally:
                    patches.append(rows)

    return in_order(known, numbered(indexed()))


def index_slide(slide: CohortSlide, spec: TilingConfig, store: str) -> SlideStatus:
    """Index one file into the store, here and now; whatever is wrong with it becomes its status."""
    return by_itself(slide, spec, store, lambda version, patches: _indexed(slide, version, spec, patches))


def _indexed(
    slide: CohortSlide, version: SourceVersion, spec: TilingConfig, patches: PatchStore
) -> tuple[SlideStatus, list[Row]]:
    def work() -> SlideStatus:
        with reading_source():
            data, guide = files.read_bytes(slide.uri), read_guide(slide, spec)
        found = read_features(data, slide.uri)
        placed = place(found.patches, len(found.offsets), slide, spec, guide)
        unchanged(slide, spec, version)()
        key = _commit(patches, hashlib.sha256(data).hexdigest(), spec, guide, found, placed)
        return SlideStatus(slide.slide_id, slide.uri, key, "committed", None, len(found.offsets))

    return outcome_of(slide, version, patches, work)


def _commit(
    store: PatchStore, digest: str, spec: TilingConfig, guide: Guide, found: FeatureFile, placed: Placed
) -> str:
    """Write the plan of a file, its record last; the key of it."""
    key = slide_key(digest, placed.mpp, guide.digest)
    uri, n = files.join(store.uri, key), len(found.offsets)
    rows, nothing = np.arange(n), np.zeros(n, np.int64)
    columns = [rows, rows, *placed.corners.T, nothing, nothing, found.offsets, nothing + found.bytes_a_row]
    arrays = [pa.array(column).cast(field.type) for column, field in zip(columns, INDEX, strict=True)]
    index = parquet_bytes(pa.table(arrays, schema=INDEX))
    picture, scale = _picture(placed)
    files.write_bytes(files.join(uri, "index.parquet"), index)
    files.write_bytes(files.join(uri, THUMBNAIL), picture)
    files.write_bytes(files.join(uri, OUTLINE), _NOWHERE)  # of the tissue nothing is known
    width, height = placed.dimensions
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "spec": spec.identity(),
        "key": key,
        "content": digest,
        "vendor": found.layout,
        "features": {"dim": found.dim, "dtype": found.dtype, "encoder": found.encoder},
        "mpp": placed.mpp,
        "guide": guide.digest,
        "series": None,
        "dimensions": [width, height],
        "bounds": [0, 0, width, height],
        "levels": [[width, height, 1.0]],
        "level": 0,
        "read_px": round(placed.extent),
        "patch_px": placed.patch_px,
        "downsample": placed.extent / placed.patch_px,
        "stride": placed.step,
        "grid": None,
        "rejects": {},
        "n_patches": n,
        "n_bad_tiles": 0,
        "bad_tiles": [],
        "evidence": {"mask": {"share": None, "beyond": None}},
        "files": [_file(OUTLINE, _NOWHERE)],
        "parts": [],
        "thumbnail": {**_file(THUMBNAIL, picture), "scale": scale},
        "index": _file("index.parquet", index),
    }
    files.write_json(files.join(uri, "slide.json"), facts)
    return key


def _picture(placed: Placed) -> tuple[bytes, float]:
    """Where the patches are, as a JPEG of at most 512 px, and its level-0 px per px."""
    scale = max(1.0, max(placed.dimensions) / THUMBNAIL_PX)
    width, height = (max(1, round(edge / scale)) for edge in placed.dimensions)
    image = Image.new("RGB", (width, height), _GLASS)
    pencil = ImageDraw.Draw(image)
    for x, y, right, lower in _boxes(placed, scale):
        pencil.rectangle((x, y, max(x, right - 1), max(y, lower - 1)), fill=_PATCH)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90)
    return sink.getvalue(), scale


def _boxes(placed: Placed, scale: float) -> Iterator[list[int]]:
    corners = np.concatenate([placed.corners, placed.corners + placed.extent], axis=1) / scale
    yield from np.floor(corners).astype(np.int64).tolist()


def _file(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
