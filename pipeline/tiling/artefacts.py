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

from pipeline.tiling.tissue import Colour, brightness, deviation, glass_colour, mean_filter, optical_density, reached
from pipeline.tiling.windows import Mask, all_of, any_of, in_bands, sums

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
    *rules, brown, flat = in_bands(lambda band: _rules(band, glass), rgb)
    brown &= _near_flat(flat)
    for narrow, wide in zip(rules[::2], rules[1::2], strict=True):
        brown |= reached(narrow, wide, _FEWEST)
    return brown


def _rules(rgb: npt.NDArray[np.uint8], glass: Colour) -> list[Mask]:
    """The narrow and the wide rule for cool, red and black ink, what is brown, and flat too."""
    red, green, blue = (mean_filter(channel, 3) for channel in optical_density(rgb, glass))
    floor = np.maximum(green, np.float32(_THINNEST))
    of_red, of_blue = red / floor, blue / floor
    over_tissue = (of_red > 0.92) & (of_blue < 0.5) & (red > 0.3)
    cool = (of_red > 1.3) & (red > 0.06), ((of_red > 1.2) & (red > 0.02)) | over_tissue
    warm = (of_red < 0.22) & (of_blue > 0.75) & (green > 0.5), (of_red < 0.3) & (of_blue > 0.7) & (green > 0.1)
    grey = (of_red > 0.8) & (of_red < 1.15) & (of_blue > 0.95) & (of_blue < 1.35) & (green > 0.03)
    over_tissue = (of_red > 0.75) & (of_red < 1.15) & (of_blue > 0.85) & (of_blue < 1.35) & (green > 0.9)
    dark = over_tissue | (grey & (green > 0.5))
    black = any_of(sums(dark.astype(np.int32), 3, "nothing") == 9, 3) if dark.any() else dark, grey
    pale = (of_red > 0.35) & (green > 0.02) & (green < 0.1)
    brown = (pale | ((of_red > 0.78) & (green < 0.25))) & (of_red < 1.15) & (of_blue > 0.95) & (green > 0.02)
    flat = brown & (deviation(rgb, _WINDOW) < BROWN_SMOOTH * green) if brown.any() else brown
    return [*cool, *warm, *black, brown, flat]


def _near_flat(flat: Mask) -> Mask:
    """Px near a square that is all flat: DAB over haematoxylin has a glass edge's hues, and is never flat so far."""
    return any_of(any_of(all_of(flat, _BROWN_PX), _BROWN_PX), 2 * _BROWN_PX + 1)


def smooth_mask(rgb: npt.NDArray[np.uint8], coloured: Mask) -> Mask:
    """Pixels of `coloured` (h, w) that are colour without texture: tinted glass, blurred dust, flat ink.

    There the brightness of the coloured px in 5 x 5 px varies by less than `SMOOTH` (standard deviation; the
    outermost coloured px are mixed with glass and do not count). What is too thin to be judged, such as a stroke's
    edge, goes with what it touches, else it is kept.
    """
    (smooth,) = in_bands(lambda *band: [_smooth(*band)], rgb, coloured)
    return smooth


def _without_rim(mask: Mask) -> Mask:
    """Px of a mask (h, w) with no px beside, above or below that is not in it."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return inner


def _smooth(rgb: npt.NDArray[np.uint8], coloured: Mask) -> Mask:
    inner = _without_rim(coloured)
    px = sums(inner.astype(np.int32), _WINDOW, "nothing")
    judged = inner & (px >= _ENOUGH)
    bright = brightness(rgb) * inner
    total = sums(bright, _WINDOW, "nothing")
    spread = px * sums(bright * bright, _WINDOW, "nothing") - total * total
    smooth = judged & (spread < (3 * SMOOTH * px) ** 2)
    if not smooth.any():
        return np.zeros_like(coloured)
    textured = any_of(all_of(judged & ~smooth, _WINDOW), _WINDOW)
    return np.asarray(smooth | (coloured & any_of(smooth, 2 * _RIM + 1) & ~textured))
