"""One slide to patches: the mpp it is read at, the grid, the tissue filter, the encoding."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from pipeline.config.data import TilingConfig
from pipeline.errors import BadTileError, SlideError
from pipeline.segmentation.whole import segmented
from pipeline.slides.open import Overview, SlideReader
from pipeline.slides.reader import Mpp, square_mpp
from pipeline.tiling.candidates import Candidates, NothingFoundError, find_candidates
from pipeline.tiling.cutting import Cutter
from pipeline.tiling.evidence import THUMBNAIL_PX, Evidence, gather_evidence, mask_facts, thumbnail
from pipeline.tiling.grid import Cells, Grid, choose_level
from pipeline.tiling.guide import Guide
from pipeline.tiling.masks import Mask
from pipeline.tiling.sharpness import sharpness

MPP_RANGE = (0.05, 20.0)  # finer than any scanner, coarser than any slide's overview
MASK_PX_PER_PATCH = 8  # mask px along a patch's edge: a tissue share is known to about 1/64
ANNOUNCED = 4096  # patches that the reader is told of at a time: it fetches their bytes together
MASK_PX = 2048
"""Longer edge of the largest mask: beyond 256 patches a side shares are known less finely, but a slide of 100,000 px of
0.25 um still has 12 um a mask px, and planning 250,000 patches takes 260 MB instead of the 610 of 4096 px."""


@dataclass(frozen=True)
class PatchRow:
    """One encoded patch; x, y are the level-0 px of its upper left corner."""

    cell: int
    """Its place in the slide's plan."""
    x: int
    y: int
    level: int
    image: bytes
    sharpness: float | None = None
    """Of the image; None where the spec does not ask for it."""


class SlideTiling:
    """The patches of one slide: iterate over `rows()` once, whole or in slices, then read `bad_tiles` and `blurred`."""

    def __init__(self, reader: SlideReader, spec: TilingConfig, mpp: float | None, guide: Guide) -> None:
        self._reader = reader
        self.spec = spec
        longest = max(reader.dimensions)
        sized = with_native_edge(reader, spec, mpp)
        edge = sized.edge_px * (spec.mpp / mpp if spec.mpp and mpp else 1.0)
        overview = reader.overview(min(MASK_PX, max(THUMBNAIL_PX, round(longest * MASK_PX_PER_PATCH / edge))))
        try:
            segment = None
            if spec.tissue_model is not None and mpp is not None:
                segment = partial(segmented, reader, mpp, spec.tissue_model)
            found = find_candidates(overview, reader.levels, sized, mpp, guide, reader.bounds, segment)
        except SlideError as error:
            seen = error.coloured if isinstance(error, NothingFoundError) else None
            error.picture = thumbnail(overview, seen).jpeg
            raise
        self.grid: Grid = found.grid
        self.cells: Cells = found.cells
        """(n, 2) grid column and row of the patches."""
        self.rejects = found.rejects
        """Reason -> places that are no patches."""
        self.thumbnail = thumbnail(overview)
        self._looked: tuple[Overview, Candidates] | None = overview, found
        self.bad_tiles: list[tuple[int, int]] = []
        """Level-0 x, y of the patches that could not be decoded, so far."""
        self.blurred: list[float] = []
        """Sharpness of the patches that had too little of it, so far."""

    @cached_property
    def evidence(self) -> Evidence:
        """What is kept beside the patches; asked for once, while the slide is open, because the overview is let go."""
        assert self._looked is not None
        (overview, found), self._looked = self._looked, None
        return gather_evidence(self._reader, overview, found)

    def mask(self) -> tuple[Mask, dict[str, Any]]:
        """(h, w) where the tissue is over the whole slide, and what is known of that; instead of all `evidence`."""
        assert self._looked is not None
        overview, found = self._looked
        return found.mask, mask_facts(overview, found)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[PatchRow]:
        """The patches of `cells[start:stop]`, row by row of the grid; slices one after another give all of them.

        Raises:
            SlideError: "bad-tiles", as soon as more than `spec.max_bad_tiles` of the slide's patches are lost.
        """
        cutter, wanted = Cutter(self._reader, self.grid, self.spec), self.cells[start:stop]
        for first in range(0, len(wanted), ANNOUNCED):
            cells = wanted[first : first + ANNOUNCED]
            origins = self.grid.level_origins(cells)
            found = zip(self.grid.level0_origins(cells).tolist(), origins.tolist(), cutter.each(origins), strict=True)
            for cell, ((x0, y0), (x, y), image) in enumerate(found, start + first):
                try:
                    if isinstance(image, BadTileError):
                        raise image
                    sharp = self._sharpness(image, x, y)
                except BadTileError as error:
                    self._lose(x0, y0, error)
                    continue
                if sharp is None or sharp >= (self.spec.min_sharpness or 0):
                    yield PatchRow(cell, x0, y0, self.grid.level, image, sharp)
                else:
                    self.blurred.append(sharp)

    def _sharpness(self, image: bytes, x: int, y: int) -> float | None:
        """That of the patch at x, y of the level, if it is asked for; BadTileError where it cannot be decoded."""
        if self.spec.min_sharpness is None:
            return None
        level, edge = self._reader.levels[self.grid.level], self.grid.read_px
        inside = (
            min(edge, size - at) * self.grid.patch_px // edge for size, at in ((level.width, x), (level.height, y))
        )
        try:
            return sharpness(image, *inside)
        except ValueError as error:  # a tile of the slide that was taken without a look (`tiling.codec: original`)
            raise BadTileError("bad-tile", f"level {self.grid.level}, x {x}, y {y}: {error}") from error

    def check_sharp(self, left: int) -> None:
        """SlideError "blurred" where, of the patches that can be decoded, none is `left` that is sharp."""
        if not left:
            raise SlideError(
                "blurred",
                f"none of {len(self.cells)} patches has tiling.min_sharpness={self.spec.min_sharpness:g}; look at the "
                "slide, or lower it (0 measures all patches and leaves none out)",
            )

    def check_lost(self, lost: int, last: BadTileError | None = None) -> None:
        """SlideError "bad-tiles" when so many of the slide's patches cannot be decoded that it is given up."""
        total = len(self.cells)
        if lost > self.spec.max_bad_tiles * total or lost == total:
            raise SlideError(
                "bad-tiles",
                f"{lost} of {total} patches cannot be decoded, over tiling.max_bad_tiles="
                f"{self.spec.max_bad_tiles:g}; copy the slide again" + (f". The last one: {last}" if last else ""),
            ) from last

    def _lose(self, x: int, y: int, error: BadTileError) -> None:
        self.bad_tiles.append((x, y))
        self.check_lost(len(self.bad_tiles), error)

    def reads_any(self, corners: Collection[tuple[int, int]]) -> bool:
        """Whether a place that was lost is so no longer: it can be read now, or is no patch of this plan.

        Args:
            corners: level-0 x, y of the patches that could not be decoded, of a plan of a like slide.

        Raises:
            SlideError: the slide is gone or broken as a whole.
        """
        at = [tuple(corner) in corners for corner in self.grid.level0_origins(self.cells).tolist()]
        origins = self.grid.level_origins(self.cells[at])
        images = zip(Cutter(self._reader, self.grid, self.spec).each(origins), origins.tolist(), strict=True)
        return len(origins) < len(corners) or any(self._is_whole(image, *corner) for image, corner in images)

    def _is_whole(self, image: bytes | BadTileError, x: int, y: int) -> bool:
        """Whether `rows()` would not lose the patch at x, y of the level."""
        if isinstance(image, BadTileError):
            return False
        try:
            self._sharpness(image, x, y)
        except BadTileError:
            return False
        return True

    def attached(self, reader: SlideReader) -> SlideTiling:
        """The same plan for the same slide opened anew, where a tiling that was pickled has none."""
        twin = copy.copy(self)
        twin._reader, twin.bad_tiles, twin.blurred = reader, [], []
        return twin

    def share(self, start: int, stop: int) -> SlideTiling:
        """The same plan with only what cutting `cells[start:stop]` needs; smaller where patches stand on no lattice."""
        twin = copy.copy(self)
        twin.grid = self.grid.only(self.cells[start:stop])
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Without the open slide and the pictures; the cells as bits of the grid: 10 KB for 250,000 patches."""
        left_out = {"_reader", "thumbnail", "evidence", "_looked"}
        state = {name: value for name, value in vars(self).items() if name not in left_out}
        kept = np.zeros((self.grid.rows, self.grid.columns), np.bool_)
        kept[self.cells[:, 1], self.cells[:, 0]] = True
        return {**state, "cells": zlib.compress(np.packbits(kept).tobytes())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        bits = np.frombuffer(zlib.decompress(state["cells"]), np.uint8)
        cells = self.grid.cells()
        self.cells = cells[np.unpackbits(bits, count=len(cells)).astype(np.bool_)]


def tile_slide(reader: SlideReader, spec: TilingConfig, mpp: float | None, guide: Guide | None = None) -> SlideTiling:
    """Plan the patches of an open slide; they are read and encoded while `rows()` is iterated.

    Args:
        reader: the open slide.
        spec: how to tile.
        mpp: microns per level-0 px, from `effective_mpp`.
        guide: what was given beside the slide.

    Raises:
        SlideError: "unreadable", and what `find_candidates` raises.
    """
    return SlideTiling(reader, spec, mpp, guide or Guide())


def with_native_edge(reader: SlideReader, spec: TilingConfig, mpp: float | None) -> TilingConfig:
    """The spec with `patch_px: native` replaced by the edge of the tiles at the level that will be read.

    Raises:
        SlideError: "no-tiles", the slide has none that are square and known; or what `choose_level` raises.
    """
    if spec.patch_px != "native":
        return spec
    tiles = reader.native_tiles(choose_level(reader.levels, spec, mpp)[0])
    if tiles is None or tiles.width != tiles.height or tiles.width <= spec.overlap_px:
        size = "none that can be read" if tiles is None else f"{tiles.width} x {tiles.height} px"
        raise SlideError(
            "no-tiles",
            f"tiling.patch_px=native needs square tiles, larger than overlap_px={spec.overlap_px}; this slide has "
            f"{size}; give a number",
        )
    return spec.model_copy(update={"patch_px": tiles.width})


def effective_mpp(stated: Mpp | None, spec: TilingConfig, override: float | None) -> float | None:
    """Microns per level-0 px to tile with: the cohort's override, else the file's, else the default.

    None when `spec.mpp` is null: level 0 is then read as it is, and no mpp is needed.

    Args:
        stated: by the file, along x and y.
        spec: how to tile.
        override: the cohort's: px are square and of this size, whatever the file states.

    Raises:
        SlideError: "missing-mpp", "mpp-not-square" over 2% apart, or "absurd-mpp" outside 0.05..20.
    """
    if spec.mpp is None:
        return None
    mpp = override
    if mpp is None:
        mpp = spec.default_mpp if stated is None else _square(stated)
    if mpp is None:
        raise SlideError(
            "missing-mpp",
            "the file states no microns per px (of a plain image its resolution is not taken); give it in the cohort's "
            "mpp column, set tiling.default_mpp, or set tiling.mpp=null to read level 0 as it is",
        )
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise SlideError(
            "absurd-mpp",
            f"{mpp:g} microns per px is outside {MPP_RANGE[0]:g}..{MPP_RANGE[1]:g}; "
            "give the right value in the cohort's mpp column",
        )
    return mpp


def _square(stated: Mpp) -> float:
    """Microns along either side of a px; SlideError "mpp-not-square"."""
    mpp = square_mpp(stated)
    if mpp is None:
        (x, y), coarser = stated, max(stated)
        raise SlideError(
            "mpp-not-square",
            f"the file states {x:g} microns per px along x and {y:g} along y, and patches of such px would show tissue "
            f"squeezed; resample it (`vips resize IN OUT.tiff[tile,pyramid] {x / coarser:g} --vscale {y / coarser:g}`) "
            f"and give {coarser:g} in the cohort's mpp column, which says that px are square; where the file is wrong, "
            "give the right value there",
        )
    return mpp
