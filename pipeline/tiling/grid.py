"""The grid of patches over a slide: which level is read, how large, and where each patch stands.

Planes: level-0 px (full resolution), level px (the level that is read) and patch px (what the network sees).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.tiling.interchange import Coordinates
from pipeline.units import LevelPx, PatchPx

Cells = npt.NDArray[np.int64]

SNAPPED = (0.59, 1.29)  # TRIDENT takes 0.3 to 0.6 um for 0.5 and up to 0.16 for 0.125: its patches against true ones
SAME = 0.0025  # share by which a patch may miss its size at a level and is read as it is: levels have 1/4.004 of the px
_DIVISION = 1e-9  # strides: of 250,000 a division errs by up to 1e-10; the nearest other corner is 1e-6 away


class LevelSize(Protocol):
    """What the grid must know of a pyramid level."""

    @property
    def width(self) -> int:
        """In px of the level."""

    @property
    def height(self) -> int:
        """In px of the level."""

    @property
    def downsample(self) -> float:
        """Level-0 px per px of the level."""


@dataclass(frozen=True)
class Grid:
    """Patches from the upper left corner, in rows of columns."""

    level: int
    downsample: float
    """Level-0 px per px of `level`."""
    read_px: LevelPx
    """Edge of a patch at `level`; equal to `patch_px` when the level is read as it is."""
    stride_px: LevelPx
    patch_px: PatchPx
    columns: int
    rows: int
    last: tuple[int, int]
    """x, y of the last patch's corner, px of `level`: nearer than a stride where it was shifted inwards."""

    @property
    def scale(self) -> float:
        """Level-0 px per patch px."""
        return self.downsample * self.read_px / self.patch_px

    @property
    def extent(self) -> float:
        """Edge of a patch, in level-0 px."""
        return self.downsample * self.read_px

    def cells(self) -> Cells:
        """(rows * columns, 2) column and row of each patch, row by row."""
        row, column = np.divmod(np.arange(self.rows * self.columns, dtype=np.int64), self.columns)
        return np.stack([column, row], axis=1)

    def level_origins(self, cells: Cells) -> Cells:
        """(n, 2) x, y of the patches' upper left corners, in px of `level`."""
        return np.minimum(cells * self.stride_px, self.last)

    def level0_origins(self, cells: Cells) -> Cells:
        """(n, 2) x, y of the patches' upper left corners, in level-0 px."""
        corners: Cells = np.rint(self.level_origins(cells) * self.downsample).astype(np.int64)
        return corners

    def level0_boxes(self, cells: Cells) -> npt.NDArray[np.float64]:
        """(n, 4) left, top, right, bottom of the patches, in level-0 px, not rounded."""
        corner = self.level_origins(cells) * self.downsample
        return np.concatenate([corner, corner + self.extent], axis=1)

    def only(self, cells: Cells) -> Grid:
        """As little of the grid as these neighbouring cells need; under the same numbers they stand where they did."""
        del cells  # a lattice is some numbers, however many cells it has
        return self


def plan_grid(levels: Sequence[LevelSize], spec: TilingConfig, mpp: float | None) -> Grid:
    """Lay the grid of `spec` over a slide whose level 0 has `mpp` microns per px.

    A level within `spec.mpp_tolerance` of `spec.mpp` is read as it is; otherwise the next finer one, at the
    size that covers `patch_px` at `spec.mpp`. With `spec.mpp` null it is level 0 as it is, and `mpp` unused.

    Raises:
        SlideError: "too-coarse" (even level 0 is coarser than `spec.mpp`), "too-small" (with `spec.edge` drop: no whole
            patch fits).
    """
    number, factor = choose_level(levels, spec, mpp)
    level = levels[number]
    read = round(spec.edge_px * factor)
    stride = max(1, round((spec.edge_px - spec.overlap_px) * factor))
    sizes = (level.width, level.height)
    if spec.edge == "drop" and min(sizes) < read:
        raise SlideError(
            "too-small",
            f"{level.width} x {level.height} px at level {number} hold no patch of {read} px "
            f"(tiling.patch_px={spec.patch_px}); lower tiling.patch_px, set tiling.edge=pad, or leave the slide out",
        )
    (columns, right), (rows, bottom) = (_axis(size, read, stride, spec) for size in sizes)
    edges = LevelPx(read), LevelPx(stride), PatchPx(spec.edge_px)
    return Grid(number, level.downsample, *edges, columns, rows, (right, bottom))


def _axis(size: int, read: int, stride: int, spec: TilingConfig) -> tuple[int, int]:
    """How many patches stand along an axis of a level, and where the last one does."""
    whole, rest = divmod(max(0, size - read), stride)
    count = whole + 1 + (rest > 0 and spec.edge != "drop")
    return count, max(0, size - read) if spec.edge == "inside" else (count - 1) * stride


def cells_at(corners: Cells, stride: float) -> Cells:
    """(n, 2) grid column and row of patches by their corners (n, 2), as `Grid.level0_origins` gives them.

    The last column and row may stand nearer than a stride (level-0 px) to the one before, and still count as the next.
    """
    strides = (corners - 0.5) / stride  # corners are rounded up by half a px at most
    cells: Cells = np.ceil(strides - _DIVISION).astype(np.int64)
    return cells


def choose_level(levels: Sequence[LevelSize], spec: TilingConfig, mpp: float | None) -> tuple[int, float]:
    """The level that `plan_grid` reads, and its px per patch px (1.0: as it is); errors as there."""
    return (0, 1.0) if spec.mpp is None or mpp is None else _choose(levels, spec, spec.mpp, mpp)


def _choose(levels: Sequence[LevelSize], spec: TilingConfig, target: float, mpp: float) -> tuple[int, float]:
    """The level to read, and the level px per patch px (1.0: as it is)."""
    try:
        return choose_near(levels, target, mpp, spec.mpp_tolerance)
    except ValueError as error:
        raise SlideError(
            "too-coarse",
            f"level 0 has {mpp:g} microns per px, coarser than tiling.mpp={target:g}; "
            "raise tiling.mpp (patches are never enlarged) or correct the cohort's mpp",
        ) from error


def choose_near(levels: Sequence[LevelSize], target: float, mpp: float, tolerance: float) -> tuple[int, float]:
    """The level to read for px of `target` microns, and the level's px per such px; `mpp` is that of level 0.

    1.0 (as it is) where a level is within `tolerance` of the target. Otherwise it is the next finer one; ValueError
    where there is none.
    """
    ratios = [mpp * level.downsample / target for level in levels]
    nearest = min(range(len(ratios)), key=lambda number: abs(ratios[number] - 1.0))
    if abs(ratios[nearest] - 1.0) <= tolerance:
        return nearest, 1.0
    finer = [number for number, ratio in enumerate(ratios) if ratio < 1.0]
    if not finer:
        raise ValueError(f"level 0 has {mpp:g} microns per px, coarser than {target:g}")
    best = max(finer, key=lambda number: ratios[number])
    return best, 1.0 / ratios[best]


@dataclass(frozen=True)
class PlacedGrid(Grid):
    """Patches that stand where a file says, not on a lattice: one row, a column for each, in the file's order."""

    corners: npt.NDArray[np.int32] = field(repr=False, compare=False)
    """(n, 2) x, y of the upper left corners of n columns, level-0 px: 8 bytes a patch travel to whoever cuts it."""
    first: int = 0
    """Number of the column whose corner is the first."""

    def level_origins(self, cells: Cells) -> Cells:
        """See `Grid.level_origins`; the nearest px of the level."""
        origins: Cells = np.rint(self.level0_origins(cells) / self.downsample).astype(np.int64)
        return origins

    def level0_origins(self, cells: Cells) -> Cells:
        """See `Grid.level0_origins`; as the file says."""
        corners: Cells = self.corners[cells[:, 0] - self.first].astype(np.int64)
        return corners

    def level0_boxes(self, cells: Cells) -> npt.NDArray[np.float64]:
        """See `Grid.level0_boxes`."""
        corner = self.level0_origins(cells).astype(np.float64)
        return np.concatenate([corner, corner + self.extent], axis=1)

    def only(self, cells: Cells) -> PlacedGrid:
        """See `Grid.only`: the corners from the first to the last of the cells."""
        start, stop = int(cells[0, 0]), int(cells[-1, 0]) + 1
        return replace(self, corners=self.corners[start - self.first : stop - self.first], first=start)


def placed_grid(
    coords: Coordinates, levels: Sequence[LevelSize], spec: TilingConfig, mpp: float | None
) -> tuple[PlacedGrid, dict[str, int]]:
    """The patches of a coordinate file that lie wholly on the slide, each once; with the number of the others.

    Each shows the square that the file names, whatever `spec.mpp` would make of the slide's microns: they are only
    brought to `spec.patch_px`, from the coarsest level at which they are not smaller.

    Args:
        coords: the file.
        levels: the slide's pyramid.
        spec: how to tile.
        mpp: microns per level-0 px.

    Raises:
        SlideError: "coords", its patches have another size, or none of them lies on the slide.
    """
    number, read = _placed_level(coords, levels, spec, mpp)
    level = levels[number]
    first = np.sort(np.unique(coords.corners, axis=0, return_index=True)[1])
    corners = coords.corners[first]
    origins = np.rint(corners / level.downsample)
    last = np.array([level.width, level.height]) - read
    inside = ((origins >= 0) & (origins <= last)).all(axis=1)
    corners = corners[inside]
    if not len(corners):
        raise SlideError(
            "coords", f"none of {len(first)} patches lies on the slide; is it {coords.tool}'s file of another slide?"
        )
    placed = PlacedGrid(
        number,
        level.downsample,
        LevelPx(read),
        LevelPx(max(1, round(coords.step / level.downsample))),
        PatchPx(spec.edge_px),
        len(corners),
        1,
        (int(last[0]), int(last[1])),
        corners=corners.astype(np.int32),
    )
    return placed, {"outside": int((~inside).sum()), "twice": len(coords.corners) - len(first)}


def _placed_level(
    coords: Coordinates, levels: Sequence[LevelSize], spec: TilingConfig, mpp: float | None
) -> tuple[int, int]:
    """The level that a file's patches are cut from, and their edge in its px; SlideError where they are no such."""
    edge = spec.edge_px
    expected = edge * (spec.mpp / mpp if spec.mpp and mpp else 1.0)
    narrowest, widest = (1.0, 1.0) if spec.mpp is None else SNAPPED
    ratio, rounding = coords.extent / expected, 1 / expected
    edges = {number: coords.extent / level.downsample for number, level in enumerate(levels)}
    large = [number for number, px in edges.items() if px >= edge * (1 - SAME)]
    if not narrowest - rounding <= ratio <= widest + rounding or not large:
        raise SlideError(
            "coords",
            f"{coords.tool}'s patches are {coords.extent:g} level-0 px wide and those of tiling.patch_px="
            f"{edge} at tiling.mpp={spec.mpp} are {expected:g}; set both to what {coords.tool} was given",
        )
    number = max(large, key=lambda number: levels[number].downsample)
    return number, edge if abs(edges[number] / edge - 1) <= SAME else round(edges[number])
