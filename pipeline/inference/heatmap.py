"""Heatmaps as PNG bytes: attention over a slide's thumbnail, on a colour scale that slides share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image

from pipeline.inference.figures import DPI, INK, Numbers, new_figure, photograph_png

_Ints = npt.NDArray[np.int64]

_PAD, _BAR, _MARGIN, _SCALE_BAR, _LINE = 14, 110, 26, 26, 16
"""px: around everything, the colour bar with its lettering, the numbers of marks, the scale bar, a line of caption."""
_LEAST = 200  # px of height that the colour bar with its title needs, beside a flat slide too
_MARK = "#007a82"
_COLOURS = ListedColormap(colormaps["inferno"](np.linspace(0.15, 1.0, 256)))  # without the near-black end
_PALETTE = np.rint(_COLOURS(np.arange(256))[:, :3] * 255).astype(np.uint8)
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
    zoom = map_px / max(height, width)
    norm = LogNorm(1.0, max(2.0, top))
    box = overlay_box(slide.thumbnail.shape[:2], marks=bool(marks), map_px=map_px)
    foot = _foot(caption)
    figure = new_figure(box.left + box.width + 2 * _PAD + _BAR, _PAD + max(box.height, _LEAST) + foot)
    total_w, total_h = figure.get_size_inches() * DPI
    below = total_h - box.top - box.height
    axes = figure.add_axes((box.left / total_w, below / total_h, box.width / total_w, box.height / total_h))
    axes.set(xlim=(0, width), ylim=(height, 0))
    dimensions = slide.dimensions or (width * slide.scale, height * slide.scale)
    scale = dimensions[0] / box.width, dimensions[1] / box.height
    cells = _cells((box.height, box.width), scale, slide.x, slide.y, slide.extent, slide.ratio)
    _marks(axes, slide, marks, zoom)
    axes.set_axis_off()
    axes.set_aspect("auto")
    bar_height = min(0.66, 360 / total_h)
    beside = figure.add_axes(((box.left + box.width + _PAD) / total_w, 0.5 - bar_height / 2, 18 / total_w, bar_height))
    _colour_bar(figure, beside, norm, clipped=clipped)
    _scale_bar(figure, slide, zoom, box.left, foot)
    for number, line in enumerate(caption):
        y = (_PAD / 2 + _LINE * (len(caption) - number - 0.5)) / total_h
        figure.text(box.left / total_w, y, line, fontsize=7, color=INK, va="center", ha="left", parse_math=False)
    return photograph_png(figure, _blended(slide.thumbnail, (box.width, box.height), cells, norm), (box.left, box.top))


def overlay_box(shape: tuple[int, int], *, marks: bool = False, map_px: int = 900) -> Box:
    """Where `overlay_png` shows a slide whose thumbnail has this height and width."""
    height, width = (max(1, round(edge * map_px / max(shape))) for edge in shape)
    return Box((_MARGIN if marks else 0) + _PAD, _PAD + max(0, _LEAST - height), width, height)


def _foot(caption: Sequence[str]) -> int:
    """Px below the slide."""
    return _PAD // 2 + _SCALE_BAR + _LINE * len(caption)


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


def _blended(thumbnail: npt.NDArray[np.uint8], size: tuple[int, int], cells: _Cells, norm: LogNorm) -> Image.Image:
    """The greyed thumbnail, of width and height `size`, below the colours of ratios.

    They are clear up to uniform, and from there ever denser, without a step.
    """
    below = Image.fromarray(thumbnail).convert("RGB", _GREYED).resize(size, Image.Resampling.BICUBIC)
    place = np.asarray(norm(np.maximum(cells.values, 1.0)), np.float64).clip(0, 1)
    colour = Image.fromarray(cells.spread((len(_PALETTE) * place).clip(0, len(_PALETTE) - 1).astype(np.uint8)))
    colour.putpalette(_PALETTE.tobytes())
    dense = 255 * 0.7 * np.sqrt(place)  # what lies below is to be read everywhere
    return Image.composite(colour.convert("RGB"), below, Image.fromarray(cells.spread(np.rint(dense).astype(np.uint8))))


def _colour_bar(figure: Figure, axes: Axes, norm: LogNorm, *, clipped: bool) -> None:
    bar = figure.colorbar(ScalarMappable(norm, _COLOURS), cax=axes, extend="max" if clipped else "neither")
    steps = [base * 10**power for power in range(7) for base in (1, 2, 5)]
    bar.ax.yaxis.set_major_locator(FixedLocator([step for step in steps if step <= norm.vmax]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}\N{MULTIPLICATION SIGN}"))
    bar.ax.tick_params(labelsize=9, length=2, pad=2, colors=INK)
    bar.outline.set_visible(False)
    bar.ax.set_title("attention\nvs uniform", fontsize=8, color=INK, loc="left", pad=11)


def _marks(axes: Axes, slide: Heatmap, rows: Sequence[int], zoom: float) -> None:
    """Frames around patches, and their numbers in the margin, each with a line to its patch; nothing is covered."""
    axes.set_autoscale_on(False)  # what stands in the margin must not move the picture
    edge = slide.extent / slide.scale
    corners = [(float(slide.x[row]) / slide.scale, float(slide.y[row]) / slide.scale) for row in rows]
    gap = 17 / zoom  # between two numbers, in thumbnail px
    heights = _spread([y + edge / 2 for _, y in corners], gap, slide.thumbnail.shape[0])
    for number, ((x, y), label) in enumerate(zip(corners, heights, strict=True), start=1):
        around = 1.5 / zoom
        frame = (x - around, y - around), edge + 2 * around, edge + 2 * around
        axes.add_patch(Rectangle(*frame, fill=False, edgecolor=_MARK, linewidth=1.2, clip_on=False))
        axes.plot([-6 / zoom, x - around], [label, y + edge / 2], color=_MARK, linewidth=0.6, alpha=0.8, clip_on=False)
        axes.text(-9 / zoom, label, str(number), fontsize=8, color=_MARK, va="center", ha="right", clip_on=False)


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


def _scale_bar(figure: Figure, slide: Heatmap, zoom: float, left: float, foot: float) -> None:
    """A bar of a round length, a quarter of the slide's width at most, and what it is long."""
    total_w, total_h = figure.get_size_inches() * DPI
    unit = slide.mpp or 1.0
    length = round_length(slide.thumbnail.shape[1] * slide.scale * unit / 4)
    px = length / unit / slide.scale * zoom
    y = (foot - _SCALE_BAR / 2) / total_h
    figure.add_artist(
        Line2D([left / total_w, (left + px) / total_w], [y, y], color=INK, linewidth=2.5, solid_capstyle="butt")
    )
    name = (
        f"{length:g} px" if slide.mpp is None else f"{length:g} \u00b5m" if length < 1000 else f"{length / 1000:g} mm"
    )
    figure.text((left + px + 8) / total_w, y, name, fontsize=7, color=INK, va="center", ha="left")


def round_length(longest: float) -> float:
    """The largest of 1, 2, 5, 10, 20 ... that is not over `longest`."""
    power = 10.0 ** np.floor(np.log10(longest))
    return float(max(step * power for step in (1, 2, 5) if step * power <= longest))
