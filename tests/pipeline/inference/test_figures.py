from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.inference.figures import reliability_png, roc_png, scatter_png
from pipeline.inference.operating import reliability


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_one_and_several_roc_curves_draw() -> None:
    curve = (np.array([0.0, 0.2, 1.0]), np.array([0.0, 0.9, 1.0]))
    one, several = _pixels(roc_png({"yes": curve})), _pixels(roc_png({"a": curve, "b": curve, "c": curve}))
    assert one.shape == several.shape
    assert (one != several).any()


def test_points_of_a_scatter_stand_above_the_line_where_too_much_was_predicted() -> None:
    true = np.linspace(0.0, 10.0, 30)
    blue = []
    for shift in (3.0, -3.0):
        pixels = _pixels(scatter_png(np.append(true, [0.0, 10.0]), np.append(true + shift, [-5.0, 15.0]), "age"))
        y, _ = np.nonzero((pixels[..., 2] - pixels[..., 0]) > 60)
        blue.append(float(y.mean()))
    assert blue[0] < blue[1]


def test_calibration_stands_above_the_line_where_more_came_true_than_was_said() -> None:
    generator = np.random.default_rng(0)
    blue = []
    for shift in (0.25, -0.25):
        said = generator.uniform(0.3, 0.7, 400)
        came = generator.uniform(size=400) < said + shift
        pixels = _pixels(reliability_png({"yes": reliability(said, came)}))[:400]
        y, _ = np.nonzero((pixels[..., 2] - pixels[..., 0]) > 60)
        blue.append(float(y.mean()))
    assert blue[0] < blue[1]
