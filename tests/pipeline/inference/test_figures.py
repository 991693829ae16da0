from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.inference.figures import attention_map, overlay_png, roc_png, scatter_png


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_the_map_paints_patches_where_they_lie_and_averages_overlaps() -> None:
    x, y = np.array([0, 20, 30]), np.array([10, 0, 0])
    field = attention_map((6, 7), 10.0, x, y, 20.0, np.array([1.0, 2.0, 4.0]))
    expected = [
        [0, 0, 2, 3, 4, 0, 0],
        [1, 1, 2, 3, 4, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(field, expected)


def test_patches_smaller_than_a_pixel_still_show() -> None:
    field = attention_map((3, 4), 100.0, np.array([250]), np.array([130]), 5.0, np.array([7.0]))
    assert field[1, 2] == 7.0
    assert np.count_nonzero(field) == 1


def test_the_overlay_colours_attended_patches_only() -> None:
    thumbnail = np.full((157, 211, 3), 200, np.uint8)
    x, y = np.array([0, 96]), np.array([0, 64])
    plain = _pixels(overlay_png(thumbnail, 1.0, x, y, 32.0, np.array([0.5, 0.5], np.float32)))
    hot = _pixels(overlay_png(thumbnail, 1.0, x, y, 32.0, np.array([0.1, 0.9], np.float32)))
    assert hot.shape == plain.shape
    zoom, pad = 900 / 211, 14
    at = {name: (int(pad + cy * zoom), int(pad + cx * zoom)) for name, cx, cy in (("cold", 16, 16), ("hot", 112, 80))}
    assert len(set(hot[at["cold"]].tolist())) == 1  # grey
    assert len(set(hot[at["hot"]].tolist())) == 3
    assert len(set(plain[at["hot"]].tolist())) == 1


def test_marks_are_drawn_and_equal_inputs_give_equal_bytes() -> None:
    thumbnail = np.full((101, 67, 3), 220, np.uint8)
    x, y, attention = np.array([0, 32]), np.array([0, 64]), np.array([0.4, 0.6])
    first = overlay_png(thumbnail, 1.0, x, y, 32.0, attention, marks=[1])
    assert first == overlay_png(thumbnail, 1.0, x, y, 32.0, attention, marks=[1])
    assert first != overlay_png(thumbnail, 1.0, x, y, 32.0, attention)


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
