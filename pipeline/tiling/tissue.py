"""Where the tissue is: a mask from a low-resolution image, what in it is no tissue, and its share of any box."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

FLOOR = 12  # of 255: glass, scanner noise and JPEG error stay below; Otsu on blank glass would split noise
CEILING = 30  # of 255: where tissue fills the image Otsu splits stain from stain, and pale stroma is lost
SMOOTH = 1.5  # of 255: at 1.4 to 35 um per px 99.5% of real H&E varies by more than 4.5, glass and ink by less than 1
_WINDOW = 5  # px: edge of the square that a texture is measured in
_ENOUGH = 9  # coloured px in it; over fewer, a small deviation is chance
_RIM = 4  # px: how far a verdict reaches to the px around, which are too few or too mixed for one of their own

Boxes = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Table = npt.NDArray[np.int32]


def tissue_mask(rgb: npt.NDArray[np.uint8]) -> Mask:
    """Pixels of rgb (h, w, 3) that are coloured: saturation above Otsu's threshold.

    The saturation is max - min of the channels (HSV's S times V, so that black borders do not count),
    averaged over 3 x 3 px. The threshold is kept in [12, 30] of 255.
    """
    saturation = _mean3(rgb.max(axis=2).astype(np.float32) - rgb.min(axis=2))
    threshold = np.clip(otsu(saturation), FLOOR, CEILING)
    return np.asarray(saturation > threshold)


def artefact_mask(rgb: npt.NDArray[np.uint8], coloured: Mask) -> Mask:
    """Pixels of `coloured` (h, w) that are colour without texture: pen marks, tinted glass, blurred dust.

    There the brightness of the coloured px in 5 x 5 px varies by less than `SMOOTH` (standard deviation; the
    outermost coloured px are mixed with glass and do not count). What is too thin to be judged, such as a stroke's
    edge, goes with what it touches, else it is kept. Black ink and
    black dust have no colour: they are not in `coloured` at all.
    """
    inner = ndimage.binary_erosion(coloured, border_value=1)
    share = ndimage.uniform_filter(inner.astype(np.float32), _WINDOW, mode="constant")
    judged = inner & (share * _WINDOW**2 > _ENOUGH - 0.5)
    grey = np.where(inner, rgb.mean(axis=2, dtype=np.float32), np.float32(0))
    share = np.maximum(share, np.float32(1 / _WINDOW**2))
    mean = ndimage.uniform_filter(grey, _WINDOW, mode="constant") / share
    square = ndimage.uniform_filter(grey * grey, _WINDOW, mode="constant") / share
    smooth = judged & (square - mean * mean < SMOOTH**2)
    if not smooth.any():
        return np.zeros_like(coloured)
    near = ndimage.maximum_filter(smooth, 2 * _RIM + 1)
    textured = ndimage.maximum_filter(ndimage.minimum_filter(judged & ~smooth, _WINDOW), _WINDOW)
    return np.asarray(smooth | (coloured & near & ~textured))


def otsu(values: npt.NDArray[np.float32]) -> float:
    """Otsu's threshold (1979) of values in 0..255: it maximises the variance between the two classes."""
    counts = np.bincount(values.astype(np.uint8).ravel(), minlength=256).astype(np.float64)
    level = np.arange(256.0)
    below = np.cumsum(counts)
    above = below[-1] - below
    moment = np.cumsum(counts * level)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (moment / below - (moment[-1] - moment) / above) ** 2
    return float(np.argmax(np.nan_to_num(between, nan=0.0)))


def integral_image(mask: Mask) -> Table:
    """(h + 1, w + 1) sums of mask (h, w) above and left of each corner."""
    table = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int32)
    for above, row, line in zip(table, table[1:], mask, strict=False):  # whole, numpy would sum in a second table
        np.cumsum(line, out=row[1:])
        row += above
    return table


def tissue_fraction(table: Table, boxes: Boxes) -> npt.NDArray[np.float64]:
    """Share of each box that is tissue, exact for fractional edges.

    Args:
        table: `integral_image` of the mask.
        boxes: (n, 4) left, top, right, bottom in mask px, with positive area, inside the mask.
    """
    left, top, right, bottom = boxes.T
    covered = (
        _integral(table, right, bottom)
        - _integral(table, left, bottom)
        - _integral(table, right, top)
        + _integral(table, left, top)
    )
    return np.asarray(np.clip(covered / ((right - left) * (bottom - top)), 0.0, 1.0))


def _integral(table: Table, x: Boxes, y: Boxes) -> Boxes:
    """The integral image at fractional coordinates: bilinear, which is exact for constant pixels."""
    column = np.clip(np.floor(x).astype(np.int64), 0, table.shape[1] - 2)
    line = np.clip(np.floor(y).astype(np.int64), 0, table.shape[0] - 2)
    u, v = np.clip(x - column, 0.0, 1.0), np.clip(y - line, 0.0, 1.0)
    upper = table[line, column] * (1 - u) + table[line, column + 1] * u
    lower = table[line + 1, column] * (1 - u) + table[line + 1, column + 1] * u
    return np.asarray(upper * (1 - v) + lower * v)


def _mean3(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    padded = np.pad(values, 1, mode="edge")
    height, width = values.shape
    total = np.zeros_like(values)
    for dy in range(3):
        for dx in range(3):
            total += padded[dy : dy + height, dx : dx + width]
    return total / np.float32(9)
