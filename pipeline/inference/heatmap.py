"""Heatmaps as PNG bytes: attention over a slide's thumbnail, on a colour scale that slides share."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from PIL import Image, ImageDraw

from pipeline.inference.figures import INK, Numbers, photograph_bytes, typeface

_Ints = npt.NDArray[np.int64]

_PAD, _BAR, _MARGIN, _SCALE_BAR, _LINE = 14, 110, 26, 26, 16
"""px: around everything, the colour bar with its lettering, the numbers of marks, the scale bar, a line of caption."""
_CAPTION = 480  # px of width that a caption gets, below a narrow slide too
_LEAST = 200  # px of height that the colour bar with its title needs, beside a flat slide too
_SMALL, _MIDDLE, _LARGE = 14.5, 16.5, 18.5
"""px of lettering: captions, titles and numbers of marks, the scale."""
_MARK, _FINE = "#007a82", 4  # px of a mark's drawing, along an edge of one px of the picture
_TITLE, _ARROW, _WIDE = 54, 16, 18  # px: above the colour bar, of its arrow, across it
_PALETTE = np.rint(colormaps["inferno"](np.linspace(0.15, 1.0, 256))[:, :3] * 255).astype(np.uint8)  # no near-black
_GREYED = tuple(0.8 / 3 + 0.2 * (place in (0, 5, 10)) if place % 4 < 3 else 0.0 for place in range(12))
"""Matrix of RGB to RGB: most of the colour is taken out of what lies below."""


@dataclass(frozen=True)
class Heatmap:
    """What a heatmap shows of one slide."""

    thumbnail: npt.NDArray[np.uint8]
    """(h, w, 3)."""
    scale: float
    """Level-0 px per thumbnail px."""
    x: Numbers
    """(N,) level-0 px of the patches' left edges."""
    y: Numbers
    """(N,) of their upper edges."""
    extent: float
    """Edge of a patch in level-0 px."""
    attention: Numbers
    """(N,), sums to 1; of one slide of several that were looked at together, to its share."""
    mpp: float | None
    """Microns per level-0 px, for the scale bar; without it the bar is in px."""
    dimensions: tuple[int, int] | None = None
    """Width and height of the slide, level-0 px; without them `scale` alone says where a patch lies, to half a px."""
    among: int | None = None
    """Patches that the attention was shared between, where other slides have some of them; else N."""

    @property
    def ratio(self) -> npt.NDArray[np.float64]:
        """(N,) attention relative to uniform: attention * `among`."""
        return np.asarray(self.attention, np.float64) * (self.among or len(self.attention))


def highest(attentions: Iterable[Numbers]) -> float:
    """Upper end of the colour scale that slides are shown on together: their largest attention relative to uniform."""
    return max((len(each) * float(np.max(each, initial=0.0)) for each in attentions), default=1.0)


class Box(NamedTuple):
    """Where the slide lies within a picture, px."""

    left: int
    top: int
    width: int
    height: int


def overlay_png(
    slide: Heatmap,
    top: float,
    *,
    caption: Sequence[str] = (),
    marks: Sequence[int] = (),
    map_px: int = 900,
    clipped: bool = False,
) -> bytes:
    """Attention over a greyed thumbnail, with a colour bar, a scale bar and a caption.

    The colour is the attention relative to uniform, on a log scale; patches below uniform stay grey, so what the model
    looked at stands out whatever the size of the slide. Edges of patches are where they are, to half a px.

    Args:
        slide: what is shown.
        top: upper end of the scale (`highest`): one for all slides that are compared.
        caption: lines below the picture.
        marks: rows to frame, and to number from 1 in the margin.
        map_px: longer edge of the slide in the picture; the lettering does not scale with it.
        clipped: more than `top` has the colour of `top`, and the colour bar says so.
    """
    height, width = slide.thumbnail.shape[:2]
    high = max(2.0, top)
    box = overlay_box((height, width), marks=bool(marks), map_px=map_px)
    across = box.left + box.width + 2 * _PAD + _BAR
    across = max(across, _CAPTION) if caption else across
    lines = wrapped(caption, across - box.left - _PAD)
    foot = _foot(lines)
    size = across, _PAD + max(box.height, _LEAST) + foot
    dimensions = slide.dimensions or (width * slide.scale, height * slide.scale)
    scale = dimensions[0] / box.width, dimensions[1] / box.height
    cells = _cells((box.height, box.width), scale, slide.x, slide.y, slide.extent, slide.ratio)
    picture = Image.new("RGB", size, "white")
    picture.paste(_blended(slide.thumbnail, (box.width, box.height), cells, high), (box.left, box.top))
    if marks:
        _add_marks(picture, box, [(slide.x[row], slide.y[row]) for row in marks], slide.extent, scale)
    below = size[1] - foot
    _add_colour_bar(picture, (box.left + box.width + _PAD, below), high, clipped=clipped)
    pen = ImageDraw.Draw(picture)
    _draw_scale_bar(pen, box.left, below + _SCALE_BAR / 2, dimensions[0] / 4, slide.mpp, scale[0])
    for number, line in enumerate(lines):
        y = below + _SCALE_BAR + _LINE * (number + 0.5)
        pen.text((box.left, y), line, INK, typeface(_SMALL), "lm")
    return photograph_bytes(picture)


def overlay_box(shape: tuple[int, int], *, marks: bool = False, map_px: int = 900) -> Box:
    """Where `overlay_png` shows a slide whose thumbnail has this height and width."""
    height, width = (max(1, round(edge * map_px / max(shape))) for edge in shape)
    return Box((_MARGIN if marks else 0) + _PAD, _PAD + max(0, _LEAST - height), width, height)


def _foot(lines: Sequence[str]) -> int:
    """Px below the slide."""
    return _PAD // 2 + _SCALE_BAR + _LINE * len(lines)


def wrapped(caption: Sequence[str], px: float, size: float = _SMALL) -> list[str]:
    """Lines of a caption, none wider than `px`: broken between words, and within one that is wider itself.

    Args:
        caption: lines.
        px: width that they have.
        size: px of the typeface.
    """
    found: list[str] = []
    for line in caption:
        first, *words = line.split(" ")
        *above, row = _cut(first, px, size)
        for word in words:
            whole = f"{row} {word}"
            if typeface(size).getlength(whole) <= px:
                row = whole
            else:
                above.append(row)
                *pieces, row = _cut(word, px, size)
                above += pieces
        found += [*above, row]
    return found


def _cut(word: str, px: float, size: float) -> list[str]:
    """Pieces of a word, each as wide as `px` allows, or of one letter."""
    pieces, most = [], max(1, int(px))  # letters of a piece; to measure takes the longer the more there are
    while len(word) > 1 and (len(word) > most or typeface(size).getlength(word) > px):
        fits = _fitting(word[:most], px, size)
        pieces.append(word[:fits])
        word = word[fits:]
    return [*pieces, word]


def _fitting(word: str, px: float, size: float) -> int:
    """Of its letters, as many as are no wider than `px`; one at least, and not all."""

    def width(many: int) -> float:
        return typeface(size).getlength(word[:many])

    return 1 + bisect_right(range(2, len(word)), px, key=width)


def attention_map(
    shape: tuple[int, int], scale: float | tuple[float, float], x: Numbers, y: Numbers, extent: float, values: Numbers
) -> npt.NDArray[np.float64]:
    """Values of patches (N,) painted into px (h, w) of a picture; mean where patches overlap, 0 where none lies.

    `scale` is level-0 px per px, or that along x and along y. An edge goes to the nearest border between px, and a
    patch that is smaller than a px has the one that it begins in.
    """
    cells = _cells(shape, scale, x, y, extent, values)
    return cells.spread(cells.values)


class _Cells(NamedTuple):
    """A picture of rectangles of px of one value each: patches have few different edges, and a picture many px."""

    values: npt.NDArray[np.float64]
    """(r, c)."""
    rows: _Ints
    """(h,) which of r each px is in."""
    columns: _Ints
    """(w,) likewise."""

    def spread(self, shown: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What is shown of each value (r, c) -> (h, w) px."""
        return shown[self.rows].take(self.columns, axis=1)


def _cells(
    shape: tuple[int, int], scale: float | tuple[float, float], x: Numbers, y: Numbers, extent: float, values: Numbers
) -> _Cells:
    """As `attention_map`."""
    along = np.broadcast_to(np.asarray(scale, np.float64), 2)[:, None]
    low = np.stack([x, y]).astype(np.float64)
    high = np.stack([patch_ends(edges, extent) for edges in low])
    begin, end = (np.floor(edge / along + 0.5).astype(int) for edge in (low, high))
    thin = end <= begin
    begin = np.where(thin, np.floor(low / along).astype(int), begin)
    limit = np.array([[shape[1]], [shape[0]]])
    begin, end = begin.clip(0, limit), np.where(thin, begin + 1, end).clip(0, limit)
    (lefts, rights, columns), (tops, bottoms, rows) = (
        _edges(begin[axis], end[axis], shape[1 - axis]) for axis in (0, 1)
    )
    total, count = (np.zeros((rows[-1] + 2, columns[-1] + 2)) for _ in range(2))
    for down, right, sign in ((tops, lefts, 1), (tops, rights, -1), (bottoms, lefts, -1), (bottoms, rights, 1)):
        np.add.at(total, (down, right), sign * np.asarray(values, np.float64))
        np.add.at(count, (down, right), sign)
    whole, many = (grid.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] for grid in (total, count))
    # what is summed up and taken off again leaves its rounding
    return _Cells(np.where(many > 0.5, np.round(whole / np.maximum(many, 1), 9), 0.0), rows, columns)


def _edges(begin: _Ints, end: _Ints, length: int) -> tuple[_Ints, _Ints, _Ints]:
    """Numbers of the cells along an axis at which patches begin and end; and in which each of its px is."""
    edges = np.unique(np.concatenate([[0], begin, end]))
    cells = np.searchsorted(edges, np.arange(length), side="right") - 1
    return np.searchsorted(edges, begin), np.searchsorted(edges, end), cells


def patch_ends(low: Numbers, extent: float) -> npt.NDArray[np.float64]:
    """Where patches end along an axis that begin at `low` (N,): where others begin, if that is a px away.

    Patches that adjoin begin at whole px and are of a broken number of them, so each stops short of the next, or runs
    into it, by a px at most.
    """
    begins = np.asarray(low, np.float64)
    ends: npt.NDArray[np.float64] = begins + extent
    if len(begins):
        starts = np.unique(begins)
        near = starts[np.minimum(np.searchsorted(starts, ends - 1), len(starts) - 1)]
        meet = np.abs(near - ends) <= 1
        ends[meet] = near[meet]
    return ends


def _blended(thumbnail: npt.NDArray[np.uint8], size: tuple[int, int], cells: _Cells, high: float) -> Image.Image:
    """The greyed thumbnail, of width and height `size`, below the colours of ratios.

    They are clear up to uniform, and from there ever denser, without a step.
    """
    below = Image.fromarray(thumbnail).convert("RGB", _GREYED).resize(size, Image.Resampling.BICUBIC)
    place = _place(np.maximum(cells.values, 1.0), high).clip(0, 1)
    colour = Image.fromarray(cells.spread((len(_PALETTE) * place).clip(0, len(_PALETTE) - 1).astype(np.uint8)))
    colour.putpalette(_PALETTE.tobytes())
    dense = 255 * 0.7 * np.sqrt(place)  # what lies below is to be read everywhere
    return Image.composite(colour.convert("RGB"), below, Image.fromarray(cells.spread(np.rint(dense).astype(np.uint8))))


def _place(ratio: Any, high: float) -> npt.NDArray[np.float64]:
    """Where in the scale of ratios from 1 to `high` one is: 0 to 1."""
    return np.asarray(np.log(ratio) / np.log(high), np.float64)


def _add_colour_bar(picture: Image.Image, corner: tuple[int, int], high: float, *, clipped: bool) -> None:
    """Right of `corner` and above it, where captions begin, in the picture's middle where there is room."""
    (left, below), least = corner, _TITLE + _ARROW
    height = min(picture.height * 2 // 3, 360, below - least)
    top, pen = min(max((picture.height - height) // 2, least), below - height), ImageDraw.Draw(picture)
    shades = _PALETTE[np.linspace(len(_PALETTE) - 1, 0, height).round().astype(int)]
    picture.paste(Image.fromarray(shades[:, None]).resize((_WIDE, height)), (left, top))
    if clipped:
        corners = [(left, top - 1), (left + _WIDE - 1, top - 1), (left + _WIDE / 2 - 0.5, top - _ARROW)]
        pen.polygon(corners, fill=tuple(_PALETTE[-1].tolist()))
    for step in _ticks(high, height):
        y = top + height * (1 - float(_place(step, high)))
        pen.line([(left + _WIDE, y), (left + _WIDE + 3, y)], INK, 2)
        pen.text((left + _WIDE + 8, y), f"{step:g}\N{MULTIPLICATION SIGN}", INK, typeface(_LARGE), "lm")
    for line, words in enumerate(("attention", "vs uniform")):
        pen.text((left, top - _ARROW - 30 + 20 * line), words, INK, typeface(_MIDDLE), "ls")


def _ticks(high: float, height: int) -> list[int]:
    """Ratios up to `high` that are lettered along a bar: 1, 2, 5, 10 ..., or of those the powers of ten that fit."""
    letters = _LARGE + 2
    bases = (1, 2, 5) if height * float(_place(2, high)) >= letters else (1,)
    every = math.ceil(letters / (height * float(_place(10, high))))
    steps = [base * 10**power for power in range(0, 7, every) for base in bases]
    return [step for step in steps if step <= high]


def _add_marks(
    picture: Image.Image, box: Box, corners: Sequence[tuple[float, float]], extent: float, scale: tuple[float, float]
) -> None:
    """Frames around patches, and their numbers in the margin, each with a line to its patch; nothing is covered."""
    across, down = (extent / along for along in scale)
    places = [(box.left + float(x) / scale[0], box.top + float(y) / scale[1]) for x, y in corners]
    labels = [box.top + y for y in _spread([y + down / 2 - box.top for _, y in places], 17, box.height)]
    drawn = Image.new("L", (picture.width * _FINE, picture.height * _FINE))
    fine, pen = ImageDraw.Draw(drawn), ImageDraw.Draw(picture)
    for (x, y), label in zip(places, labels, strict=True):
        fine.line([v * _FINE for v in (box.left - 6, label, x - 3, y + down / 2)], 200, 5)
    for number, ((x, y), label) in enumerate(zip(places, labels, strict=True), start=1):
        fine.rectangle([v * _FINE for v in (x - 3, y - 3, x + across + 3, y + down + 3)], outline=255, width=10)
        pen.text((box.left - 9, label), str(number), _MARK, typeface(_MIDDLE), "rm")
    picture.paste(_MARK, mask=drawn.reduce(_FINE))


def _spread(wanted: Sequence[float], gap: float, height: float) -> list[float]:
    """Places near the wanted ones, in their order, at least `gap` apart and within the height where there is room."""
    order = np.argsort(wanted, kind="stable")
    places = np.asarray(wanted, np.float64)[order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in range(len(places) - 1, -1, -1):
        limit = height if i == len(places) - 1 else places[i + 1] - gap
        places[i] = min(places[i], limit)
    found = np.empty(len(places))
    found[order] = places
    return found.tolist()


def _draw_scale_bar(
    pen: ImageDraw.ImageDraw, left: int, y: float, longest: float, mpp: float | None, scale: float
) -> None:
    """A bar of a round length, `longest` level-0 px at most, and what it is long; `scale` is level-0 px per px."""
    length = round_length(longest * (mpp or 1.0))
    px = max(1.0, length / (mpp or 1.0) / scale)  # of a slide of 1:500 and narrower less
    pen.rectangle((left, y - 2, left + round(px) - 1, y + 2), INK)
    name = f"{length:g} px" if mpp is None else f"{length:g} \u00b5m" if length < 1000 else f"{length / 1000:g} mm"
    pen.text((left + px + 8, y), name, INK, typeface(_SMALL), "lm")


def round_length(longest: float) -> float:
    """The largest of 1, 2, 5, 10, 20 ... that is not over `longest`."""
    power = 10.0 ** np.floor(np.log10(longest))
    return float(max(step * power for step in (1, 2, 5) if step * power <= longest))
