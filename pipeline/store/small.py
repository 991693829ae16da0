"""A small slide read whole, to be put into a pack with others: its patches, and little for people to look at."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.schema import PATCHES, SCHEMA_VERSION
from pipeline.slides.identity import reading_source
from pipeline.slides.open import SlideReader, tool_versions
from pipeline.store.commit import plan_facts, planned_patches, slide_facts
from pipeline.store.index import Ints
from pipeline.store.packs import SmallSlide
from pipeline.store.parts import record_batch
from pipeline.store.pictures import small_mask, small_overview
from pipeline.store.rows import slide_key
from pipeline.tiling.slide import SlideTiling

SMALL_PX = 2**24
"""Of a slide's patches together, 256 of 256 px: with a folder of its own such a slide waits longer for the disk (seven
files) than it takes to be tiled."""
KEPT_SHARE = 24  # of the patches' bytes: what is kept of the whole takes at most one such part of them, the mask half


def is_small(reader: SlideReader, tiling: SlideTiling) -> bool:
    """Whether the slide goes into a pack; one whose outlines do not count from its own corner has a folder.

    So has one whose patches' sharpness is kept: a pack's index has no place for it.
    """
    if tiling.spec.min_sharpness is not None:
        return False
    return len(tiling.cells) * int(tiling.grid.patch_px) ** 2 <= SMALL_PX and reader.bounds[:2] == (0, 0)


def read_small(
    digest: str, mpp: float | None, reader: SlideReader, tiling: SlideTiling, guide: str | None
) -> SmallSlide:
    """All patches of an open slide; arguments as `commit.plan_slide`.

    Raises:
        SlideError: "bad-tiles", or the slide broke as a whole.
    """
    with reading_source():
        patches = record_batch(list(tiling.rows()))
    return _small(digest, mpp, reader, tiling, guide, patches, patches.column("image").nbytes)


def plan_small(
    digest: str,
    mpp: float | None,
    reader: SlideReader,
    tiling: SlideTiling,
    guide: str | None,
    size: int,
    *,
    distrusted: bool,
) -> SmallSlide:
    """Where an open slide's patches are, without them; as `commit.write_plan`.

    Args:
        digest: of the slide's content, as the next ones.
        mpp: microns per level-0 px.
        reader: the open slide.
        tiling: its planned patches.
        guide: digest of what was given beside it.
        size: bytes of its file.
        distrusted: see `planned_patches`.
    """
    cells, corners, origins, _ = planned_patches(tiling, distrusted=distrusted)
    columns = [cells, *corners.T, np.full(len(cells), tiling.grid.level)]
    arrays = [pa.array(column).cast(field.type) for column, field in zip(columns, PATCHES, strict=False)]
    patches = pa.record_batch([*arrays, pa.array([b""] * len(cells), PATCHES.field("image").type)], schema=PATCHES)
    return _small(digest, mpp, reader, tiling, guide, patches, size, origins)


def _small(
    digest: str,
    mpp: float | None,
    reader: SlideReader,
    tiling: SlideTiling,
    guide: str | None,
    patches: pa.RecordBatch,
    size: int,
    corners: Ints | None = None,
) -> SmallSlide:
    tiling.check_lost(len(tiling.bad_tiles))
    mask, known = tiling.mask()
    facts = {
        **slide_facts(reader),
        **plan_facts(tiling),
        "tools": tool_versions(),
        "guide": guide,
        "schema_version": SCHEMA_VERSION,
        "key": slide_key(digest, mpp, guide, reader.series),
        "content": digest,
        "mpp": mpp,
        "evidence": {"mask": known, "rejected": []},
        "rejects": {**tiling.rejects, "bad-tile": len(tiling.bad_tiles)},
        "n_patches": len(patches),
        "n_bad_tiles": len(tiling.bad_tiles),
        "bad_tiles": tiling.bad_tiles,
    }
    budget = size // KEPT_SHARE
    overview, shown = small_overview(tiling.thumbnail.rgb, budget), small_mask(mask, budget // 2)
    return SmallSlide(facts, patches, overview, shown, None if corners is None else corners.astype(np.int32))
