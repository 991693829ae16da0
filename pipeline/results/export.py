"""The coordinates of a cohort's patches, and their features, as files that other tools go on with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pipeline.bags.sources import feature_store, patch_store
from pipeline.cohort.table import CohortSlide, read_cohort
from pipeline.config.recipe import Config
from pipeline.errors import SlideError, StageError
from pipeline.formats.feature_files import clam_h5, clam_pt, stamp_h5, trident_h5
from pipeline.results.quality_rows import look_up
from pipeline.storage import files
from pipeline.store.patches import StoredSlide
from pipeline.tiling.interchange import (
    FeatureTool,
    StoredGrid,
    Tool,
    attributes,
    coordinates_h5,
    file_name,
    file_stems,
    require_h5py,
)

THREADS = 16

log = logging.getLogger(__name__)


def export_coordinates(config: Config, tool: Tool, folder: str) -> dict[str, str]:
    """Write one file for each slide that is tiled; slide id -> URI. The others are named in the log.

    Raises:
        StageError: no slide is tiled.
        SlideError: a slide has no microns per px and the tool's file needs them.
        ConfigError: h5py is not installed.
    """
    if config.given_features:
        raise StageError("export: the cohort's features were made by another tool, which has the coordinates too")
    folder = files.absolute(folder)

    def write(stored: StoredSlide, slide_id: str, stem: str) -> str:
        grid = stored_grid(stored, stem)
        whole = wholly_inside(grid)
        if not whole.all():
            log.warning(
                "export: %s: %d patches that reach over the slide's edge are left out: %s shows other pixels there",
                slide_id,
                int((~whole).sum()),
                tool,
            )
            grid = replace(grid, corners=grid.corners[whole])
        uri = files.join(folder, file_name(tool, grid.name))
        files.write_bytes(uri, coordinates_h5(grid, tool, folder, config.tiling.mpp))
        return uri

    return _for_each(config, write)


def export_features(config: Config, tool: FeatureTool, folder: str) -> dict[str, str]:
    """Write the stored features of each slide as the tool would have; slide id -> URI. Numbers stay as they are.

    TRIDENT: `<slide>.h5`; CLAM: `h5_files/<slide>.h5` and `pt_files/<slide>.pt`; STAMP: `<slide>.h5`
    (`formats.feature_files`).

    Raises:
        StageError: no slide is tiled, or the config makes no features.
        StorageError: a slide has no features yet; run the embed stage.
        SlideError: a slide has no microns per px and the tool's file needs them.
        ConfigError: h5py is not installed.
    """
    if config.given_features:
        raise StageError("export: the cohort's features were made by another tool already; they lie where it put them")
    store, settings = feature_store(config)
    folder = files.absolute(folder)

    def write(stored: StoredSlide, _slide_id: str, stem: str) -> str:
        (slide,) = store.slides([stored])
        vectors, grid = slide.vectors(np.arange(slide.n_patches)), stored_grid(stored, stem)
        encoder = settings.encoder.name
        if tool == "trident":
            about = attributes(grid, "trident", folder, config.tiling.mpp)
            data = trident_h5(vectors, grid.corners, about, {"encoder": encoder, "name": stem, "savetodir": folder})
        elif tool == "clam":
            data = clam_h5(vectors, grid.corners)
            files.write_bytes(files.join(folder, "pt_files", f"{stem}.pt"), clam_pt(vectors))
        else:
            data = stamp_h5(vectors, grid.corners, _microns(grid), grid.extent, grid.patch_px, encoder)
        uri = files.join(folder, *(["h5_files"] if tool == "clam" else []), f"{stem}.h5")
        files.write_bytes(uri, data)
        return uri

    return _for_each(config, write)


def _microns(grid: StoredGrid) -> float:
    if grid.mpp is None:
        raise SlideError(
            "features", f"{grid.name}: STAMP's file names microns, and tiling.mpp is null; export for CLAM"
        )
    return grid.mpp


def _for_each(config: Config, write: Callable[[StoredSlide, str, str], str]) -> dict[str, str]:
    """What `write` made of each tiled slide, its id and its file's stem; slide id -> URI."""
    require_h5py()
    store, slides = patch_store(config), read_cohort(config.cohort.uri).slides
    rows = look_up(store, slides, config.tiling)
    keys = {row.slide_id: row.key for row in rows if row.key is not None}
    if not keys:
        raise StageError("export: no slide of the cohort is tiled; run the tile stage")
    for row in rows:
        if row.key is None:
            log.warning("export: %s is left out: %s", row.slide_id, row.reason or "not tiled yet")
    stems = file_stems([slide.slide_id for slide in slides])

    def work(slide: CohortSlide) -> tuple[str, str]:
        slide_id = slide.slide_id
        return slide_id, write(store.slide(keys[slide_id]), slide_id, stems[slide_id])

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(work, [slide for slide in slides if slide.slide_id in keys]))


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
