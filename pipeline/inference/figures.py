"""Charts as PNG bytes: ROC curves, calibration, predicted against true values. Without pyplot's global state."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import get_data_path
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageFont

from pipeline.inference.operating import Reliability

Numbers = npt.NDArray[np.int64] | npt.NDArray[np.float32] | npt.NDArray[np.float64]

DPI = 150
INK = "#1c2733"
_SHADES = ("#1f5f8b", "#c4622d", "#3c8d5a", "#7d4f9e", "#9a8a2c", "#5b6b7a")


def roc_png(curves: Mapping[str, tuple[Numbers, Numbers]]) -> bytes:
    """ROC curves: name -> (false positive rates, true positive rates)."""
    figure = new_figure(640, 600)
    axes = figure.add_axes((0.13, 0.12, 0.84, 0.85))
    axes.plot([0, 1], [0, 1], color="#b8c0c8", linewidth=1, linestyle=(0, (4, 4)))
    for number, (name, (alarms, hits)) in enumerate(curves.items()):
        colour = _SHADES[number % len(_SHADES)]
        axes.plot(alarms, hits, color=colour, linewidth=2, label=name, drawstyle="default", clip_on=False)
        if len(curves) == 1:
            axes.fill_between(alarms, hits, color=colour, alpha=0.08, linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="False positive rate", ylabel="True positive rate", aspect="equal")
    _tidy(axes)
    if len(curves) > 1:
        axes.legend(loc="lower right", fontsize=8, frameon=False)
    return png(figure)


def scatter_png(true: Numbers, predicted: Numbers, name: str) -> bytes:
    """Predicted against true values (n,), (n,), with the line on which they are equal."""
    figure = new_figure(640, 600)
    axes = figure.add_axes((0.13, 0.12, 0.84, 0.85))
    both = np.concatenate([true, predicted])
    ends = [float(both.min()), float(both.max())]
    axes.plot(ends, ends, color="#b8c0c8", linewidth=1, linestyle=(0, (4, 4)))
    axes.plot(true, predicted, "o", color="#1f5f8b", alpha=0.6, markersize=5, markeredgewidth=0)
    axes.set(xlabel=f"{name}, as labelled", ylabel=f"{name}, as predicted")
    _tidy(axes)
    return png(figure)


def reliability_png(curves: Mapping[str, Reliability]) -> bytes:
    """Calibration: name -> what was predicted and what came true, group by group; below, how many slides were where."""
    figure = new_figure(640, 600)
    axes = figure.add_axes((0.13, 0.30, 0.84, 0.67))
    below = figure.add_axes((0.13, 0.11, 0.84, 0.13), sharex=axes)
    axes.plot([0, 1], [0, 1], color="#b8c0c8", linewidth=1, linestyle=(0, (4, 4)))
    for number, (name, found) in enumerate(curves.items()):
        colour = _SHADES[number % len(_SHADES)]
        spread = np.array([found.share - found.low, found.high - found.share])
        axes.errorbar(
            found.predicted, found.share, yerr=spread.clip(0), color=colour, label=name, fmt="o-", markersize=5,
            linewidth=1.5, elinewidth=1, capsize=2, clip_on=False,
        )  # fmt: skip
        below.bar(found.predicted, found.counts, width=0.03, color=colour, alpha=0.6)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="Share of slides that have it")
    axes.tick_params(labelbottom=False)
    below.set(xlabel="Predicted probability", ylabel="Slides")
    for each in (axes, below):
        _tidy(each)
    if len(curves) > 1:
        axes.legend(loc="upper left", fontsize=8, frameon=False)
    return png(figure)


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def new_figure(width_px: float, height_px: float) -> Figure:
    """An empty white figure."""
    figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure's bytes; equal figures give equal ones."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=DPI, metadata={"Software": None})
    return sink.getvalue()


@cache
def typeface(px: float) -> ImageFont.FreeTypeFont:
    """matplotlib's, of which Pillow writes a line in a twentieth of the time; its own has no multiplication sign."""
    path = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, px, layout_engine=ImageFont.Layout.BASIC)  # the other is not everywhere


def photograph_bytes(picture: Image.Image) -> bytes:
    """A PNG of what is a photograph for the most part, in an eighth of the time that the closest compression takes.

    Runs alone, of differences to the row above: of photographs a longer search and other filters find no more.
    """
    import imagecodecs  # 0.1 s, which charts need not pay; Pillow chooses the filter row by row, by trying all

    runs, above = imagecodecs.PNG.STRATEGY.RLE, imagecodecs.PNG.FILTER.UP
    return bytes(imagecodecs.png_encode(np.ascontiguousarray(picture), level=1, strategy=runs, filter=above))
