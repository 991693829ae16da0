"""A tissue network over a whole slide: read at the network's microns per px, in tiles that overlap.

The slide lies on endless glass. A tile's outermost `overlap` px only help to judge the others and are judged by the
tiles beside it, so where the overlap is the network's reach or more (half its receptive field, less 1), no px knows in
which tile it was, and the mask is that of the whole slide in one piece. The tiles' corners are multiples of
tile - 2 * overlap apart: a network that halves its picture k times wants both to be multiples of 2^k.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.config.tissue import TissueModelConfig
from pipeline.errors import BadTileError, SlideError
from pipeline.segmentation.network import Floats, Mask, check_shape, is_tissue, open_network
from pipeline.slides.reader import BLOCK_PX, EIGHTH, RGB, Overview, SlideReader

COARSER = 1.05  # a slide whose level 0 is coarser than the network's px by more is refused: nothing is enlarged
MASK_PX = 8192  # longer edge of the mask that is kept; of larger ones the mean of f x f px, in 268 MB at most

Box = tuple[int, int, int, int]
"""Left, top, right, bottom; px of the network, or of a level."""
Window = tuple[int, int]
"""Left and top of what a tile judges, px of the network; its picture begins `overlap` px before."""


@dataclass(frozen=True)
class _Plan:
    """How a slide is read for the network."""

    level: int
    factor: float
    """Px of the level for a px of the network."""
    width: int
    """Of the slide, px of the network, the last one begun."""
    height: int


def segmented(reader: SlideReader, mpp: float, settings: TissueModelConfig, overview: Overview) -> Mask:
    """(h, w) where the network finds tissue, as the overview has its px: those of which at least half is.

    Args:
        reader: the open slide.
        mpp: microns per level-0 px.
        settings: of the network.
        overview: the whole slide; what cannot be decoded at the level that is read is taken from it.

    Raises:
        SlideError: "too-coarse", the slide has no such px; "tissue-model", the network gives no numbers.
        ConfigError: the network cannot be loaded or run (`open_network`).
    """
    plan, run = _plan(reader, mpp, settings), open_network(settings)
    shrunk = math.ceil(max(plan.width, plan.height) / MASK_PX)
    counts = np.zeros((-(-plan.height // shrunk), -(-plan.width // shrunk)), np.int32)
    for left, top in _windows(plan, settings):
        picture = _picture(reader, plan, settings, (left, top), overview)
        found = run(_normalised(picture, settings))
        check_shape(found.shape, settings)
        if not np.isfinite(found).all():
            raise SlideError(
                "tissue-model",
                f"{settings.uri} gives no numbers (NaN or infinity) at {left}, {top} px of {settings.mpp:g} microns; "
                "are tiling.tissue_model.mean and std those that it was trained with?",
            )
        inner = is_tissue(found[0], settings)[settings.overlap : -settings.overlap or None]
        inner = inner[:, settings.overlap : -settings.overlap or None]
        _add(counts, inner[: plan.height - top, : plan.width - left], left, top, shrunk)
    return _laid(counts, shrunk, plan, reader, overview)


def _plan(reader: SlideReader, mpp: float, settings: TissueModelConfig) -> _Plan:
    """The coarsest level that is at least as fine as the network's px, but for rounding."""
    ratio = settings.mpp / mpp  # level-0 px of a px
    if ratio * COARSER < 1:
        raise SlideError(
            "too-coarse",
            f"level 0 has {mpp:g} microns per px, coarser than tiling.tissue_model.mpp={settings.mpp:g}; give it a "
            "mask, take a network for coarser px, or correct the cohort's mpp",
        )
    fine = [number for number, level in enumerate(reader.levels) if level.downsample <= ratio * COARSER]
    level = max(fine, key=lambda number: reader.levels[number].downsample)
    width, height = (max(1, math.ceil(round(size / ratio, 6))) for size in reader.dimensions)
    return _Plan(level, ratio / reader.levels[level].downsample, width, height)


def _windows(plan: _Plan, settings: TissueModelConfig) -> Iterator[Window]:
    step = settings.tile - 2 * settings.overlap
    return ((left, top) for top in range(0, plan.height, step) for left in range(0, plan.width, step))


def _picture(reader: SlideReader, plan: _Plan, settings: TissueModelConfig, window: Window, overview: Overview) -> RGB:
    """(tile, tile, 3) what a tile's network sees: the slide, and glass around it."""
    x, y = (at - settings.overlap for at in window)
    left, top = max(0, x), max(0, y)
    right, bottom = min(plan.width, x + settings.tile), min(plan.height, y + settings.tile)
    picture = np.full((settings.tile, settings.tile, 3), reader.background, np.uint8)
    picture[top - y : bottom - y, left - x : right - x] = _read(reader, plan, (left, top, right, bottom), overview)
    return picture


def _read(reader: SlideReader, plan: _Plan, box: Box, overview: Overview) -> RGB:
    """The px left, top, right, bottom of the network, each the mean of those of the level that it covers."""
    left, top, right, bottom = box
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    step = max(1, int(BLOCK_PX / plan.factor))
    for y in range(top, bottom, step):
        for x in range(left, right, step):
            block = (x, y, min(x + step, right), min(y + step, bottom))
            pixels[y - top : block[3] - top, x - left : block[2] - left] = _block(reader, plan, block, overview)
    return pixels


def _block(reader: SlideReader, plan: _Plan, block: Box, overview: Overview) -> RGB:
    """As `_read`, of px that are read at once; what of them is beyond the slide is glass."""
    size = block[2] - block[0], block[3] - block[1]
    edges = [edge * plan.factor for edge in block]
    level = reader.levels[plan.level]
    eighths = plan.factor >= EIGHTH and reader.has_eighths(plan.level)
    unit = EIGHTH if eighths else 1
    x, y, right, bottom = (unit * edge for edge in _whole([edge / unit for edge in edges]))
    w, h = min(right, level.width) - x, min(bottom, level.height) - y
    pixels = np.full(((bottom - y) // unit, (right - x) // unit, 3), reader.background, np.uint8)
    try:
        if w > 0 and h > 0:
            read = (reader.read_eighth if eighths else reader.read)(plan.level, x, y, w, h)
            pixels[: read.shape[0], : read.shape[1]] = read
    except BadTileError:
        scale = level.downsample / overview.scale
        ends = overview.rgb.shape[1], overview.rgb.shape[0]
        return _averaged(
            overview.rgb, size, [min(edge * scale, end) for edge, end in zip(edges, ends * 2, strict=True)]
        )
    return _averaged(pixels, size, [(edge - start) / unit for edge, start in zip(edges, (x, y) * 2, strict=True)])


def _averaged(pixels: npt.NDArray[np.uint8], size: tuple[int, int], edges: list[float]) -> npt.NDArray[np.uint8]:
    """What lies between four edges of a picture, in a width and height: each px is the mean of those it covers."""
    left, top, right, bottom = edges
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX, (left, top, right, bottom)))


def _whole(edges: list[float]) -> Box:
    """Left, top, right, bottom of the px that a box touches."""
    return math.floor(edges[0]), math.floor(edges[1]), math.ceil(edges[2]), math.ceil(edges[3])


def _normalised(picture: RGB, settings: TissueModelConfig) -> Floats:
    """(1, 3, h, w) of a picture (h, w, 3)."""
    mean, std = (np.array(values, np.float32) for values in (settings.mean, settings.std))
    scaled = (picture.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(np.moveaxis(scaled, 2, 0)[None])


def _add(counts: npt.NDArray[np.int32], mask: Mask, left: int, top: int, shrunk: int) -> None:
    """Add a mask (h, w) at its place to the counts of px, of which one stands for shrunk x shrunk."""
    rows, columns = ((at + np.arange(size)) // shrunk for at, size in zip((top, left), mask.shape, strict=True))
    lines = np.add.reduceat(mask.astype(np.int32), np.flatnonzero(np.diff(rows, prepend=-1)), axis=0)
    sums = np.add.reduceat(lines, np.flatnonzero(np.diff(columns, prepend=-1)), axis=1)
    counts[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += sums


def _laid(counts: npt.NDArray[np.int32], shrunk: int, plan: _Plan, reader: SlideReader, overview: Overview) -> Mask:
    """The counts brought to the px of an overview; the last row and column reach over the slide's edge."""
    share = (counts * 255 // shrunk**2).astype(np.uint8)
    per_px = plan.factor * reader.levels[plan.level].downsample * shrunk  # level-0 px
    width, height = reader.dimensions
    end = [min(width / per_px, float(share.shape[1])), min(height / per_px, float(share.shape[0]))]
    rows, columns = overview.unread.shape
    return np.asarray(_averaged(share, (columns, rows), [0.0, 0.0, *end]) >= 128)
