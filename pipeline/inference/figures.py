"""Pictures as PNG bytes: attention over a slide's thumbnail, and ROC curves. Drawn without pyplot's global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

Numbers = npt.NDArray[np.int64] | npt.NDArray[np.float32] | npt.NDArray[np.float64]

_DPI = 150
_INK = "#1c2733"
_COLOURS = ListedColormap(colormaps["inferno"](np.linspace(0.15, 1.0, 256)))  # without the near-black end


def overlay_png(
    thumbnail: npt.NDArray[np.uint8],
    scale: float,
    x: Numbers,
    y: Numbers,
    extent: float,
    attention: Numbers,
    *,
    marks: Sequence[int] = (),
    map_px: int = 900,
) -> bytes:
    """Attention over a greyed thumbnail, with a colour bar.

    The colour is the attention relative to uniform (attention * N), on a log scale; patches below uniform stay
    grey, so what the model looked at stands out whatever the size of the slide.

    Args:
        thumbnail: (h, w, 3).
        scale: level-0 px per thumbnail px.
        x: (N,) level-0 px of the patches' left edges.
        y: (N,) of their upper edges.
        extent: edge of a patch in level-0 px.
        attention: (N,), sums to 1.
        marks: rows to frame and number, from 1.
        map_px: longer edge of the slide in the picture; the lettering does not scale with it.
    """
    height, width = thumbnail.shape[:2]
    zoom = map_px / max(height, width)
    ratio = np.asarray(attention, np.float64) * len(attention)
    norm = LogNorm(1.0, max(2.0, float(ratio.max())))
    bar, pad = 110, 14
    figure = _figure(width * zoom + bar + 3 * pad, height * zoom + 2 * pad)
    total_w, total_h = figure.get_size_inches() * _DPI
    axes = figure.add_axes((pad / total_w, pad / total_h, width * zoom / total_w, height * zoom / total_h))
    grey = thumbnail.mean(axis=2, keepdims=True)
    axes.imshow(((0.8 * grey + 0.2 * thumbnail) / 255).clip(0, 1), extent=(0, width, height, 0))
    field = attention_map((height, width), scale, x, y, extent, ratio)
    axes.imshow(_coloured(field, norm), extent=(0, width, height, 0), interpolation="nearest")
    for number, row in enumerate(marks, start=1):
        _mark(axes, number, float(x[row]) / scale, float(y[row]) / scale, extent / scale)
    axes.set_axis_off()
    bar_height = min(0.66, 360 / total_h)
    beside = figure.add_axes(((width * zoom + 2 * pad) / total_w, 0.46 - bar_height / 2, 18 / total_w, bar_height))
    _colour_bar(figure, beside, norm)
    return _png(figure)


def attention_map(
    shape: tuple[int, int], scale: float, x: Numbers, y: Numbers, extent: float, values: Numbers
) -> npt.NDArray[np.float64]:
    """Values of patches (N,) painted into thumbnail px (h, w); mean where patches overlap, 0 where none lies."""
    total, count = np.zeros(shape), np.zeros(shape)
    corners = np.stack([x, y]).astype(np.float64)
    left, top = np.floor(corners / scale).astype(int)
    right, bottom = np.maximum(np.floor((corners + extent) / scale).astype(int), (left + 1, top + 1))
    for x0, y0, x1, y1, value in zip(left, top, right, bottom, values, strict=True):
        total[y0:y1, x0:x1] += value
        count[y0:y1, x0:x1] += 1
    return total / np.maximum(count, 1)


def roc_png(curves: Mapping[str, tuple[Numbers, Numbers]]) -> bytes:
    """ROC curves: name -> (false positive rates, true positive rates)."""
    figure = _figure(640, 600)
    axes = figure.add_axes((0.13, 0.12, 0.84, 0.85))
    axes.plot([0, 1], [0, 1], color="#b8c0c8", linewidth=1, linestyle=(0, (4, 4)))
    shades = ("#1f5f8b", "#c4622d", "#3c8d5a", "#7d4f9e", "#9a8a2c", "#5b6b7a")
    for number, (name, (alarms, hits)) in enumerate(curves.items()):
        colour = shades[number % len(shades)]
        axes.plot(alarms, hits, color=colour, linewidth=2, label=name, drawstyle="default", clip_on=False)
        if len(curves) == 1:
            axes.fill_between(alarms, hits, color=colour, alpha=0.08, linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="False positive rate", ylabel="True positive rate", aspect="equal")
    axes.tick_params(labelsize=8, colors=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(curves) > 1:
        axes.legend(loc="lower right", fontsize=8, frameon=False)
    return _png(figure)


def scatter_png(true: Numbers, predicted: Numbers, name: str) -> bytes:
    """Predicted against true values (n,), (n,), with the line on which they are equal."""
    figure = _figure(640, 600)
    axes = figure.add_axes((0.13, 0.12, 0.84, 0.85))
    both = np.concatenate([true, predicted])
    ends = [float(both.min()), float(both.max())]
    axes.plot(ends, ends, color="#b8c0c8", linewidth=1, linestyle=(0, (4, 4)))
    axes.plot(true, predicted, "o", color="#1f5f8b", alpha=0.6, markersize=5, markeredgewidth=0)
    axes.set(xlabel=f"{name}, as labelled", ylabel=f"{name}, as predicted")
    axes.tick_params(labelsize=8, colors=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _png(figure)


def _figure(width_px: float, height_px: float) -> Figure:
    figure = Figure(figsize=(width_px / _DPI, height_px / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=_DPI, metadata={"Software": None})
    return sink.getvalue()


def _coloured(field: npt.NDArray[np.float64], norm: LogNorm) -> npt.NDArray[np.float64]:
    """(h, w) ratios -> (h, w, 4); clear below uniform, ever denser above."""
    place = np.asarray(norm(np.maximum(field, 1.0)), np.float64)
    rgba = _COLOURS(place)
    rgba[..., 3] = np.where(field > 1.0, 0.35 + 0.5 * place, 0.0)
    return rgba


def _colour_bar(figure: Figure, axes: Axes, norm: LogNorm) -> None:
    bar = figure.colorbar(ScalarMappable(norm, _COLOURS), cax=axes)
    steps = [base * 10**power for power in range(7) for base in (1, 2, 5)]
    bar.ax.yaxis.set_major_locator(FixedLocator([step for step in steps if step <= norm.vmax]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}\N{MULTIPLICATION SIGN}"))
    bar.ax.tick_params(labelsize=9, length=2, pad=2, colors=_INK)
    bar.outline.set_visible(False)
    bar.ax.set_title("attention\nvs uniform", fontsize=8, color=_INK, loc="left", pad=11)


def _mark(axes: Axes, number: int, x: float, y: float, edge: float) -> None:
    axes.add_patch(Rectangle((x, y), edge, edge, fill=False, edgecolor="#00b7c2", linewidth=1.5))
    axes.text(
        x + edge, y, str(number), fontsize=9, color="white", va="bottom", ha="left",
        bbox={"facecolor": "#007a82", "edgecolor": "none", "pad": 1.2},
    )  # fmt: skip
