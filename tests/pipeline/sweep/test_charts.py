from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from pipeline.inference.intervals import Interval
from pipeline.sweep.charts import Point, against_png, ranking_png

POINTS = [
    Point("a (exact, M 4)", "a", 4.0, Interval(0.7, 0.6, 0.8)),
    Point("a (exact, M 12)", "a", 12.0, Interval(0.8, 0.75, 0.9), marked=True),
    Point("b" * 90, "b", 7.0, Interval(0.5, float("nan"), float("nan"))),
]


def _inked(data: bytes) -> tuple[int, int, float]:
    image = Image.open(io.BytesIO(data)).convert("L")
    return *image.size, float((np.asarray(image) < 200).mean())


def test_charts_are_drawn_the_same_each_time() -> None:
    draws: list[Callable[[], bytes]] = [
        partial(ranking_png, POINTS, "AUC"),
        partial(against_png, POINTS, "M", "AUC", joined=True),
        partial(against_png, POINTS, "seconds", "AUC", joined=False),
    ]
    for draw in draws:
        assert draw() == draw()
        width, height, ink = _inked(draw())
        assert width > 500
        assert height > 200
        assert ink > 0.005


def test_a_ranking_grows_with_its_cells() -> None:
    assert _inked(ranking_png(POINTS * 5, "AUC"))[1] > _inked(ranking_png(POINTS, "AUC"))[1] + 400
