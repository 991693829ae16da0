"""Where the tissue is: a mask from a low-resolution image, and its share of any box."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.tiling.windows import Mask, bands, in_bands, sums

FLOOR = 12  # of 255: glass, scanner noise and JPEG error stay below; Otsu on blank glass would split noise
CEILING = 30  # of 255: where tissue fills the image Otsu splits stain from stain, and pale stroma is lost
FAINT = 4  # of 255: saturation of a px and of the mean over 7 x 7; pale stroma has 7 to 20, glass 0 to 2
FAINT_TEXTURE = 2.0  # of 255: standard deviation in 5 x 5 px; glass and its rims have up to 1.5, pale tissue 3 to 10
GLASS = 170  # of 255: the darkest channel of glass; stitched scans dim it to 217
GAP = 200  # of 255: the darkest channel of what may be a gap
BIN = 4  # of 255: width of the histogram's bins
BINS = 32  # the last one holds all above

Boxes = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Colour = tuple[int, int, int]
Table = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tissue:
    """What of a picture is coloured."""

    mask: Mask
    """(h, w)."""
    threshold: float
    """Saturation from which a px counts, of 255."""
    histogram: tuple[int, ...]
    """Px by saturation, in `BINS` bins of `BIN`."""


def find_tissue(rgb: npt.NDArray[np.uint8], threshold: float | None = None) -> Tissue:
    """Pixels of rgb (h, w, 3) that are coloured: saturation above a threshold, and what is faint around them.

    The saturation is max - min of the channels (HSV's S times V, so that black borders do not count) after the glass
    was made white, averaged over 3 x 3 px. The threshold is Otsu's, kept in [12, 30] of 255. Faint px are those with
    texture and a stain's hue in the mean of 7 x 7 px; they count where they hang together with some that are above the
    threshold (hysteresis).

    Args:
        rgb: the picture.
        threshold: to take instead of Otsu's; only what is above it counts then.
    """
    glass = glass_colour(rgb)
    saturation = _mean_saturation(rgb, glass)
    counts = level_counts(saturation)
    taken = float(np.clip(otsu(counts), FLOOR, CEILING)) if threshold is None else threshold
    mask = saturation > taken
    del saturation  # 16 MB of 2048 x 2048 px
    if threshold is None:
        (faint,) = in_bands(lambda band: [_faint(band, glass)], rgb)
        mask = reached(mask, faint, 1)
    binned = counts.reshape(-1, BIN).sum(axis=1)
    return Tissue(mask, taken, (*binned[: BINS - 1].tolist(), int(binned[BINS - 1 :].sum())))


def _mean_saturation(rgb: npt.NDArray[np.uint8], glass: Colour) -> Floats:
    """(h, w) saturation of rgb (h, w, 3) in the mean of 3 x 3 px."""
    saturation = np.empty(rgb.shape[:2], np.float32)
    for band in bands(len(rgb)):
        first = max(0, band.start - 1)
        part = mean_filter(_saturation(transmittance(rgb[first : band.stop + 1], glass)), 3)
        saturation[band] = part[band.start - first : band.stop - first]
    return saturation


def transmittance(rgb: npt.NDArray[np.uint8], glass: Colour) -> list[Floats]:
    """Red, green and blue (h, w) of rgb (h, w, 3), 0..255, after the glass was made white."""
    return [np.take(_light(white), rgb[..., channel]) for channel, white in enumerate(glass)]


def optical_density(rgb: npt.NDArray[np.uint8], glass: Colour) -> list[Floats]:
    """How much red, green and blue (h, w) rgb (h, w, 3) absorbs: -log10 of the share of light that is left."""
    densities = [-np.log10((_light(white) + 1) / np.float32(256)) for white in glass]
    return [np.take(density, rgb[..., channel]) for channel, density in enumerate(densities)]


def _light(white: int) -> Floats:
    """(256,) what each value of a channel is, where glass has `white` of 255."""
    return np.asarray(np.minimum(np.arange(256) * (255 / white), 255), np.float32)


def glass_colour(rgb: npt.NDArray[np.uint8]) -> Colour:
    """The commonest red, green and blue among the bright px of rgb (h, w, 3) that no stain colours, else white.

    H&E and haematoxylin let less green through than blue or red; glass, tinted or not, does not.
    """
    counts = np.zeros((3, 256), np.int64)
    for band in bands(len(rgb)):
        channels = np.moveaxis(rgb[band], 2, 0)
        least = np.minimum(channels[0], channels[2])
        glass = (np.minimum(least, channels[1]) > GLASS) & (channels[1] >= least - 3)
        for count, channel in zip(counts, channels, strict=True):
            count += np.bincount(channel[glass], minlength=256)
    if counts[0].sum() * 100 < rgb.shape[0] * rgb.shape[1]:
        return 255, 255, 255
    red, green, blue = counts.argmax(axis=1).tolist()
    return red, green, blue


def closed(mask: Mask, rgb: npt.NDArray[np.uint8], gap: float) -> Mask:
    """The mask (h, w) with its gaps of light narrower than `gap` px: morphological closing with a disc.

    Args:
        mask: the tissue.
        rgb: (h, w, 3), of which only light px are filled in: ink across the tissue is no gap.
        gap: px.
    """
    outside = ndimage.distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, np.inf)
    wide = outside > gap / 2
    near = ndimage.distance_transform_edt(~wide) > gap / 2 if wide.any() else np.ones_like(mask)
    light = np.minimum.reduce(transmittance(rgb, glass_colour(rgb))) > GAP
    return np.asarray(mask | (near & light & (outside <= gap / 2)))


def reached(seeds: Mask, wide: Mask, fewest: int) -> Mask:
    """Hysteresis: the pieces (8-connected) of `seeds | wide` with at least `fewest` seeds; all (h, w)."""
    if np.count_nonzero(seeds) < fewest:
        return np.zeros_like(seeds)
    labels, count = ndimage.label(seeds | wide, np.ones((3, 3)))
    found = np.zeros(count + 1, np.int64)
    for band in bands(len(seeds)):  # whole, numpy would make int64 of all labels
        found += np.bincount(labels[band][seeds[band]], minlength=count + 1)
    return np.asarray((found >= fewest)[labels])


def deviation(rgb: npt.NDArray[np.uint8], edge: int) -> Floats:
    """(h, w) standard deviation of the brightness in edge x edge px around each."""
    bright = brightness(rgb)
    total, px = sums(bright, edge), edge**2
    spread = px * sums(bright * bright, edge) - total * total  # of 5 x 5 px 366 million at most
    return np.asarray(np.sqrt(spread.astype(np.float32)) / np.float32(3 * px), np.float32)


def brightness(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """(h, w) red, green and blue of rgb (h, w, 3) together, 0..765: sums of its squares stay exact."""
    red, green, blue = np.moveaxis(rgb, 2, 0)
    return np.asarray(red.astype(np.int32) + green + blue, np.int32)


def mean_filter(values: Floats, edge: int) -> Floats:
    """(h, w) means of edge x edge px; beyond the rim the outermost px go on."""
    return np.asarray(sums(values, edge) / np.float32(edge**2), np.float32)


def _faint(rgb: npt.NDArray[np.uint8], glass: Colour) -> Mask:
    """Px with texture whose surroundings have a stain's hue: green absorbed more than blue, and red not much more."""
    light = transmittance(rgb, glass)
    wide = [sums(channel, 7) for channel in light]
    red, green, blue = (mean_filter(channel, 7) for channel in optical_density(rgb, glass))
    floor = np.maximum(green, np.float32(0.002))
    hue = (blue < np.float32(0.95) * floor) & (red < np.float32(1.2) * floor)
    faint = hue & (_saturation(wide) > 49 * FAINT) & (mean_filter(deviation(rgb, 5), 3) > FAINT_TEXTURE)
    tinted = faint & (_saturation(light) > FAINT)
    return np.asarray(tinted | (faint & (sums(tinted.astype(np.int32), 3) > 4)))  # no rim of glass around


def _saturation(channels: list[Floats]) -> Floats:
    return np.asarray(np.maximum.reduce(channels) - np.minimum.reduce(channels), np.float32)


def level_counts(values: Floats) -> npt.NDArray[np.int64]:
    """(256,) how many of values (h, w) in 0..255 have each whole level."""
    parts = (np.bincount(values[band].astype(np.uint8).ravel(), minlength=256) for band in bands(len(values)))
    return np.asarray(sum(parts, np.zeros(256, np.int64)))


def otsu(levels: npt.NDArray[np.int64]) -> float:
    """Otsu's threshold (1979) of counts (256,) by level: it maximises the variance between the two classes."""
    counts = levels.astype(np.float64)
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
    for band in bands(len(mask)):  # whole, numpy would sum in a second table
        part = table[band.start + 1 : band.stop + 1]
        part[:, 1:] = np.cumsum(np.cumsum(mask[band], axis=1, dtype=np.int32), axis=0)
        part += table[band.start]
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
