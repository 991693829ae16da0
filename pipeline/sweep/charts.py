"""The charts of a sweep's page, as PNG: what accuracy costs, what M brings, the intervals side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pipeline.inference.figures import INK, new_figure, png
from pipeline.inference.intervals import Interval

_SHADES = ("#1f5f8b", "#c4622d", "#3c8d5a", "#7d4f9e", "#9a8a2c", "#5b6b7a")


@dataclass(frozen=True)
class Point:
    """A cell in a chart."""

    name: str
    group: str
    """Points of one group have one colour."""
    x: float
    found: Interval
    marked: bool = False


def ranking_png(points: Sequence[Point], measure: str) -> bytes:
    """Intervals one below the other, in the order given."""
    figure = new_figure(980, 130 + 46 * len(points))
    height = figure.get_size_inches()[1] * 150
    axes = figure.add_axes((0.40, 70 / height, 0.57, 1 - 90 / height))
    groups = list(dict.fromkeys(point.group for point in points))
    for row, point in enumerate(points):
        colour = _SHADES[groups.index(point.group) % len(_SHADES)]
        _interval(axes, point, row, colour, upright=False)
    axes.set_yticks(range(len(points)), [_short(point.name) for point in points])
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.set_xlabel(measure)
    axes.grid(axis="x", color="#dfe4e9", linewidth=0.8)
    _tidy(axes)
    return png(figure)


def against_png(points: Sequence[Point], x: str, measure: str, *, joined: bool) -> bytes:
    """Intervals above what stands on the x axis, on a log scale; joined: the points of a group are a line."""
    figure = new_figure(860, 560)
    groups = list(dict.fromkeys(point.group for point in points))
    named = 0.04 * -(-len(groups) // 2)  # lines of two names, above the axes: beside no interval
    axes = figure.add_axes((0.11, 0.13, 0.86, max(0.3, 0.82 - named)))
    for number, group in enumerate(groups):
        colour = _SHADES[number % len(_SHADES)]
        own = sorted((point for point in points if point.group == group), key=lambda point: point.x)
        if joined:
            axes.plot([p.x for p in own], [p.found.value for p in own], color=colour, linewidth=1.5)
        for point in own:
            _interval(axes, point, point.x, colour, upright=True)
        axes.plot([], [], "o", color=colour, label=_short(group))
    axes.set_xscale("log")
    if joined:
        axes.set_xticks(sorted({point.x for point in points}))
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=x, ylabel=measure)
    axes.grid(color="#eef1f4", linewidth=0.8)
    figure.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0.03, 1), ncols=2)
    _tidy(axes)
    return png(figure)


def _interval(axes: Axes, point: Point, place: float, colour: str, *, upright: bool) -> None:
    low, value, high = point.found.low, point.found.value, point.found.high
    reach = [[max(0.0, value - low)], [max(0.0, high - value)]] if low == low else None
    x, y = (place, value) if upright else (value, place)
    shape, size = ("D", 9) if point.marked else ("o", 5)
    across, along = (None, reach) if upright else (reach, None)
    axes.errorbar(
        [x], [y], yerr=along, xerr=across, fmt=shape, color=colour, markersize=size, elinewidth=1.4, capsize=3
    )


def _short(name: str) -> str:
    return name if len(name) <= 44 else f"{name[:43]}\N{HORIZONTAL ELLIPSIS}"


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=7, colors=INK)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
