"""Numbers of patches as pixels of a tile: whole level-0 px where it shows level 0, means where patches overlap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.view.pyramid import Step

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Squares:
    """Where patches lie: `x`, `y` and `size` (N,), level-0 px."""

    x: Floats
    y: Floats
    size: Floats

    def __len__(self) -> int:
        return len(self.x)


def painted(squares: Squares, values: Floats, step: Step, column: int, row: int) -> tuple[Floats, Mask]:
    """The mean of the patches on each px of a tile (h, w), and whether there is one; 0 where there is none.

    A px belongs to a patch that its middle lies in; a patch smaller than a px has the one at its corner. Each patch
    is four numbers at its corners whose sums from the upper left are the picture, so the cost is that of the px and of
    a look at every patch.
    """
    x, y, width, height = step.box(column, row)
    left, right = _edges(squares.x, squares.size, step.downsample, x)
    top, bottom = _edges(squares.y, squares.size, step.downsample, y)
    inside = np.flatnonzero((right > 0) & (left < width) & (bottom > 0) & (top < height))
    if not len(inside):
        return np.zeros((height, width)), np.zeros((height, width), np.bool_)
    columns = [np.clip(edge[inside], 0, width) for edge in (left, right)]
    rows = [np.clip(edge[inside], 0, height) for edge in (top, bottom)]
    count = _summed(rows, columns, np.ones(len(inside)), height, width)
    covered = count > 0.5  # whole numbers, but for what float64 loses
    total = _summed(rows, columns, values[inside], height, width)
    return np.divide(total, count, out=np.zeros_like(total), where=covered), covered


def shade(mask: Mask, dimensions: tuple[int, int], step: Step, column: int, row: int) -> Mask:
    """A mask of the whole slide (H, W) on the px of a tile (h, w): what lies at each px's middle.

    Args:
        mask: of any size.
        dimensions: width and height of the slide, level-0 px.
        step: see `painted`, as `column` and `row`.
        column: of the tile.
        row: of the tile.
    """
    x, y, width, height = step.box(column, row)
    places = [
        np.minimum(((np.arange(start, start + length) + 0.5) * step.downsample * small / whole).astype(int), small - 1)
        for start, length, small, whole in (
            (x, width, mask.shape[1], dimensions[0]),
            (y, height, mask.shape[0], dimensions[1]),
        )
    ]
    return mask[np.ix_(places[1], places[0])]


def _edges(
    start: Floats, size: Floats, downsample: float, origin: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First px of each patch along one axis, and the first behind it, counted from the tile's."""
    first = np.ceil(start / downsample - 0.5).astype(np.int64) - origin
    behind = np.ceil((start + size) / downsample - 0.5).astype(np.int64) - origin
    return first, np.maximum(behind, first + 1)


def _summed(
    rows: list[npt.NDArray[np.int64]], columns: list[npt.NDArray[np.int64]], values: Floats, height: int, width: int
) -> Floats:
    """Sum of the values of all rectangles over each px."""
    (top, bottom), (left, right), wide = rows, columns, width + 1
    cells = np.concatenate([top * wide + left, bottom * wide + right, top * wide + right, bottom * wide + left])
    corners = np.bincount(cells, np.concatenate([values, values, -values, -values]), (height + 1) * wide)
    sums: Floats = corners.reshape(height + 1, wide).cumsum(0).cumsum(1)[:height, :width]
    return sums
