"""The coordinates of a cohort's patches, as files that other tools go on with."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pipeline.bags.sources import patch_store
from pipeline.cohort.table import CohortSlide, read_cohort
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.results.quality import look_up
from pipeline.storage import files
from pipeline.store.patches import StoredSlide
from pipeline.tiling.interchange import StoredGrid, Tool, coordinates_h5, file_name, file_stems, require_h5py

THREADS = 16

log = logging.getLogger(__name__)


def export_coordinates(config: Config, tool: Tool, folder: str) -> dict[str, str]:
    """Write one file for each slide that is tiled; slide id -> URI. The others are named in the log.

    Raises:
        StageError: no slide is tiled.
        SlideError: a slide has no microns per px and the tool's file needs them.
        ConfigError: h5py is not installed.
    """
    require_h5py()
    store, folder = patch_store(config), files.absolute(folder)
    slides = read_cohort(config.cohort.uri).slides
    rows = look_up(store, slides, config.tiling)
    keys = {row.slide_id: row.key for row in rows if row.key is not None}
    if not keys:
        raise StageError("export: no slide of the cohort is tiled; run the tile stage")
    for row in rows:
        if row.key is None:
            log.warning("export: %s is left out: %s", row.slide_id, row.reason or "not tiled yet")
    stems = file_stems([slide.slide_id for slide in slides])

    def write(slide: CohortSlide) -> tuple[str, str]:
        grid = stored_grid(store.slide(keys[slide.slide_id]), stems[slide.slide_id])
        whole = wholly_inside(grid)
        if not whole.all():
            log.warning(
                "export: %s: %d patches that reach over the slide's edge are left out: %s shows other pixels there",
                slide.slide_id,
                int((~whole).sum()),
                tool,
            )
            grid = replace(grid, corners=grid.corners[whole])
        uri = files.join(folder, file_name(tool, grid.name))
        files.write_bytes(uri, coordinates_h5(grid, tool, folder, config.tiling.mpp))
        return slide.slide_id, uri

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(write, [slide for slide in slides if slide.slide_id in keys]))


def wholly_inside(grid: StoredGrid) -> npt.NDArray[np.bool_]:
    """Which patches (n,) show nothing beyond the slide: the tools paint that otherwise than `tiling.edge=pad` does."""
    ends = np.rint(grid.corners / grid.level_downsample) + grid.read_px
    return np.asarray((ends <= grid.level_size).all(axis=1))


def stored_grid(stored: StoredSlide, name: str) -> StoredGrid:
    """What a coordinate file says of a committed slide; patches that came from another such file overlap as there."""
    facts, index = stored.facts(), stored.index()
    width, height, downsample = facts["levels"][stored.level]
    return StoredGrid(
        name=name,
        corners=np.stack([index.x, index.y], axis=1),
        patch_px=stored.patch_px,
        extent=stored.extent,
        overlap_px=round(stored.patch_px - stored.stride / stored.downsample),
        level=stored.level,
        read_px=facts["read_px"],
        level_size=(width, height),
        level_downsample=downsample,
        dimensions=stored.dimensions,
        mpp=stored.mpp,
    )
