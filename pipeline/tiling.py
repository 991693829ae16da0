"""One slide to patches: the mpp it is read at, the grid, the tissue filter, the encoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.config_data import TilingConfig
from pipeline.errors import BadTileError, SlideError
from pipeline.grid import Cells, Grid, plan_grid
from pipeline.slide import RGB, Overview, SlideReader
from pipeline.tissue import tissue_fraction, tissue_mask

MPP_RANGE = (0.05, 20.0)  # finer than any scanner, coarser than any slide's overview
MASK_PX_PER_PATCH = 8  # mask px along a patch's edge: a tissue share is known to about 1/64
MASK_PX = 4096  # longer edge of the largest mask: 50 MB of RGB
THUMBNAIL_PX = 512
THUMBNAIL_QUALITY = 85


@dataclass(frozen=True)
class PatchRow:
    """One encoded patch; x, y are the level-0 px of its upper left corner."""

    x: int
    y: int
    level: int
    image: bytes


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of the slide."""

    jpeg: bytes
    width: int
    height: int
    scale: float
    """Level-0 px per thumbnail px."""


class SlideTiling:
    """The patches of one slide: iterate over `rows()` once, whole or in slices, then read `bad_tiles`."""

    def __init__(self, reader: SlideReader, spec: TilingConfig, mpp: float | None) -> None:
        self._reader = reader
        self.spec = spec
        longest = max(reader.dimensions)
        edge = spec.patch_px * (spec.mpp / mpp if spec.mpp and mpp else 1.0)
        overview = reader.overview(min(MASK_PX, max(THUMBNAIL_PX, round(longest * MASK_PX_PER_PATCH / edge))))
        self.grid: Grid = plan_grid(reader.levels, spec, mpp)
        self.thumbnail = _thumbnail(overview)
        cells = self.grid.cells()
        self.n_grid = len(cells)
        """Patches before the tissue filter."""
        self.cells: Cells = cells[_is_tissue(overview, self.grid, spec, cells)]
        """(n, 2) grid column and row of the patches with enough tissue."""
        self.bad_tiles: list[tuple[int, int]] = []
        """Level-0 x, y of the patches that could not be decoded, so far."""
        if len(self.cells) == 0:
            raise SlideError(
                "no-tissue",
                f"none of {self.n_grid} patches is at least {spec.min_tissue:.0%} tissue; look at the slide, "
                "lower tiling.min_tissue, or set tiling.tissue=none",
            )

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[PatchRow]:
        """The patches of `cells[start:stop]`, row by row of the grid; slices one after another give all of them.

        Raises:
            SlideError: "bad-tiles", as soon as more than `spec.max_bad_tiles` of the slide's patches are lost.
        """
        cells = self.cells[start:stop]
        corners = self.grid.level0_origins(cells).tolist()
        for (x0, y0), (x, y) in zip(corners, self.grid.level_origins(cells).tolist(), strict=True):
            try:
                rgb = self._reader.read(self.grid.level, x, y, self.grid.read_px, self.grid.read_px)
            except BadTileError as error:
                self._lose(x0, y0, error)
            else:
                yield PatchRow(x0, y0, self.grid.level, _encode(self._resize(rgb), self.spec.jpeg_quality))

    def _lose(self, x: int, y: int, error: BadTileError) -> None:
        self.bad_tiles.append((x, y))
        lost, total = len(self.bad_tiles), len(self.cells)
        if lost > self.spec.max_bad_tiles * total or lost == total:
            raise SlideError(
                "bad-tiles",
                f"{lost} of {total} patches cannot be decoded, over tiling.max_bad_tiles="
                f"{self.spec.max_bad_tiles:g}; copy the slide again. The last one: {error}",
            ) from error

    def _resize(self, rgb: RGB) -> RGB:
        edge = int(self.grid.patch_px)
        if len(rgb) == edge:
            return rgb
        return np.asarray(Image.fromarray(rgb).resize((edge, edge), Image.Resampling.BOX))


def tile_slide(reader: SlideReader, spec: TilingConfig, mpp: float | None) -> SlideTiling:
    """Plan the patches of an open slide; they are read and encoded while `rows()` is iterated.

    Args:
        reader: the open slide.
        spec: how to tile.
        mpp: microns per level-0 px, from `effective_mpp`.

    Raises:
        SlideError: "unreadable", "too-coarse", "too-small", "no-tissue".
    """
    return SlideTiling(reader, spec, mpp)


def effective_mpp(stated: float | None, spec: TilingConfig, override: float | None) -> float | None:
    """Microns per level-0 px to tile with: the cohort's override, else the file's, else the default.

    None when `spec.mpp` is null: level 0 is then read as it is, and no mpp is needed.

    Raises:
        SlideError: "missing-mpp", or "absurd-mpp" outside 0.05..20.
    """
    if spec.mpp is None:
        return None
    mpp = override or stated or spec.default_mpp
    if mpp is None:
        raise SlideError(
            "missing-mpp",
            "the file states no microns per px; give it in the cohort's mpp column, set tiling.default_mpp, "
            "or set tiling.mpp=null to read level 0 as it is",
        )
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise SlideError(
            "absurd-mpp",
            f"{mpp:g} microns per px is outside {MPP_RANGE[0]:g}..{MPP_RANGE[1]:g}; "
            "give the right value in the cohort's mpp column",
        )
    return mpp


def _is_tissue(overview: Overview, grid: Grid, spec: TilingConfig, cells: Cells) -> np.ndarray:
    """(n,) which patches to keep. What the overview could not read is tried, so that its loss is counted."""
    if spec.tissue == "none":
        return np.ones(len(cells), np.bool_)
    mask = tissue_mask(overview.rgb) | overview.unread
    height, width = mask.shape
    boxes = grid.level0_boxes(cells) / overview.scale
    fraction = tissue_fraction(mask, np.minimum(boxes, np.array([width, height, width, height])))
    return np.asarray((fraction >= spec.min_tissue) & (fraction > 0))


def _thumbnail(overview: Overview) -> Thumbnail:
    image = Image.fromarray(overview.rgb)
    share = min(1.0, THUMBNAIL_PX / max(image.size))
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    small = np.asarray(image.resize(size, Image.Resampling.BOX))
    scale = overview.scale * max(image.size) / max(size)
    return Thumbnail(_encode(small, THUMBNAIL_QUALITY), *size, scale)


def _encode(rgb: RGB, quality: int) -> bytes:
    """JPEG, 4:4:4, with libjpeg's accurate DCT."""
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=quality, colorspace="RGB")
    return bytes(data)
