"""Where the tissue is: a mask from a low-resolution image, and its share of any box."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FLOOR = 12  # of 255: glass, scanner noise and JPEG error stay below; Otsu on blank glass would split noise
CEILING = 30  # of 255: where tissue fills the image Otsu splits stain from stain, and pale stroma is lost

Boxes = npt.NDArray[np.float64]


def tissue_mask(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Pixels of rgb (h, w, 3) that are coloured: saturation above Otsu's threshold.

    The saturation is max - min of the channels (HSV's S times V, so that black borders do not count),
    averaged over 3 x 3 px. The threshold is kept in [12, 30] of 255.
    """
    saturation = _mean3(rgb.max(axis=2).astype(np.float32) - rgb.min(axis=2))
    threshold = np.clip(otsu(saturation), FLOOR, CEILING)
    return np.asarray(saturation > threshold)


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


def tissue_fraction(mask: npt.NDArray[np.bool_], boxes: Boxes) -> npt.NDArray[np.float64]:
    """Share of each box that is tissue, exact for fractional edges.

    Args:
        mask: (h, w).
        boxes: (n, 4) left, top, right, bottom in mask px, with positive area, inside the mask.
    """
    table = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    table[1:, 1:] = mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    left, top, right, bottom = boxes.T
    covered = (
        _integral(table, right, bottom)
        - _integral(table, left, bottom)
        - _integral(table, right, top)
        + _integral(table, left, top)
    )
    return np.asarray(np.clip(covered / ((right - left) * (bottom - top)), 0.0, 1.0))


def _integral(table: Boxes, x: Boxes, y: Boxes) -> Boxes:
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
