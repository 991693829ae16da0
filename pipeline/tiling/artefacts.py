"""What on a slide has colour and is no tissue: ink by its hue, tinted glass and blur by their lack of texture.

Hues are measured as optical density (Beer-Lambert), which adds up where things lie over each other: the share of red
and of blue light that is absorbed, over that of green. Stains lie between haematoxylin (0.93, 0.41), eosin (0.07,
0.11) and DAB (0.47, 1.37) (Ruifrok and Johnston, 2001); on nine overviews of H&E 98% of the tissue is within 0.06 to
0.90 and 0.22 to 0.84, that of one IHC section reaches 1.18. Real inks stand apart: teal, green and blue absorb red at
1.3 to 4.5 times green, red ink green and blue alike (0.7 to 1.2) and hardly any red (0.07 to 0.26), and black ink
with its brown rim everything alike (0.86 to 0.97, 1.08 to 1.21).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.tiling.tissue import (
    Colour,
    Mask,
    deviation,
    glass_colour,
    in_bands,
    mean_filter,
    optical_density,
    reached,
)

SMOOTH = 1.5  # of 255: at 1.4 to 35 um per px 99.5% of real H&E varies by more than 4.5, glass and ink by less than 1
BROWN_SMOOTH = 40.0  # of 255, per density: 95% of an IHC section varies by more than 55, a glass edge by 23
_BROWN_PX = 7  # edge of the square that is so; in an IHC section there is none, at 50 per density either
_WINDOW = 5  # px: edge of the square that a texture is measured in
_ENOUGH = 9  # coloured px in it; over fewer, a small deviation is chance
_RIM = 4  # px: how far a verdict reaches to the px around, which are too few or too mixed for one of their own
_FEWEST = 4  # px that are ink beyond doubt, before what touches them is
_THINNEST = 0.004  # density: below, a ratio is noise


def artefact_mask(rgb: npt.NDArray[np.uint8], coloured: Mask) -> Mask:
    """Pixels of `coloured` (h, w) that are no tissue: ink, and colour without texture."""
    return (ink_mask(rgb) | smooth_mask(rgb, coloured)) & coloured


def ink_mask(rgb: npt.NDArray[np.uint8]) -> Mask:
    """Pixels of rgb (h, w, 3) whose hue no stain has: pen of any colour, rims of black pen, edges of the glass.

    Each kind has a narrow rule, and a wide one for what touches it (hysteresis): the pale ends of a stroke, or ink over
    tissue. Mean densities of 3 x 3 px are judged, so strokes of two px are found.
    """
    glass = glass_colour(rgb)
    *rules, brown = in_bands(lambda band: _rules(band, glass), rgb)
    for narrow, wide in zip(rules[::2], rules[1::2], strict=True):
        brown |= reached(narrow, wide, _FEWEST)
    return brown


def _rules(rgb: npt.NDArray[np.uint8], glass: Colour) -> list[Mask]:
    """The narrow and the wide rule for cool, red and black ink, and what is brown and flat."""
    red, green, blue = (mean_filter(channel, 3) for channel in optical_density(rgb, glass))
    floor = np.maximum(green, np.float32(_THINNEST))
    of_red, of_blue = red / floor, blue / floor
    over_tissue = (of_red > 0.92) & (of_blue < 0.5) & (red > 0.3)
    cool = (of_red > 1.3) & (red > 0.06), ((of_red > 1.2) & (red > 0.02)) | over_tissue
    warm = (of_red < 0.22) & (of_blue > 0.75) & (green > 0.5), (of_red < 0.3) & (of_blue > 0.7) & (green > 0.1)
    grey = (of_red > 0.8) & (of_red < 1.15) & (of_blue > 0.95) & (of_blue < 1.35) & (green > 0.03)
    over_tissue = (of_red > 0.75) & (of_red < 1.15) & (of_blue > 0.85) & (of_blue < 1.35) & (green > 0.9)
    black = ndimage.binary_opening(over_tissue | (grey & (green > 0.5)), np.ones((3, 3))), grey
    pale = (of_red > 0.35) & (green > 0.02) & (green < 0.1)
    brown = (pale | ((of_red > 0.78) & (green < 0.25))) & (of_red < 1.15) & (of_blue > 0.95) & (green > 0.02)
    return [*cool, *warm, *black, brown & _near_flat(brown & (deviation(rgb, _WINDOW) < BROWN_SMOOTH * green))]


def _near_flat(flat: Mask) -> Mask:
    """Px near a square that is all flat: DAB over haematoxylin has a glass edge's hues, and is never flat so far."""
    squares = ndimage.maximum_filter(ndimage.minimum_filter(flat, _BROWN_PX), _BROWN_PX)
    return np.asarray(ndimage.maximum_filter(squares, 2 * _BROWN_PX + 1))


def smooth_mask(rgb: npt.NDArray[np.uint8], coloured: Mask) -> Mask:
    """Pixels of `coloured` (h, w) that are colour without texture: tinted glass, blurred dust, flat ink.

    There the brightness of the coloured px in 5 x 5 px varies by less than `SMOOTH` (standard deviation; the
    outermost coloured px are mixed with glass and do not count). What is too thin to be judged, such as a stroke's
    edge, goes with what it touches, else it is kept.
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
