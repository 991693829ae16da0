from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.predictions.sheet import Shown, sheet_png


def test_patches_stand_in_rows_of_six_under_their_titles() -> None:
    colours = np.random.default_rng(0).integers(0, 200, (8, 3))
    shown = [
        Shown(simplejpeg.encode_jpeg(np.full((37, 37, 3), colour, np.uint8), quality=95), f"#{n} 2\u00d7")
        for n, colour in enumerate(colours)
    ]
    data = sheet_png(["slide a, each 112 \u00b5m wide"], [("Most", shown[:7]), ("Least", shown[7:])])
    assert data == sheet_png(["slide a, each 112 \u00b5m wide"], [("Most", shown[:7]), ("Least", shown[7:])])
    picture = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    left, top, step = 10 + 80, 10 + 18 + 10 + 18 + 80, 188
    places = [(top, left + 170 * k) for k in range(6)] + [(top + step, left), (top + 2 * step + 28, left)]
    for colour, (y, x) in zip(colours, places, strict=True):
        assert np.abs(picture[y, x] - colour).max() < 12
    assert (picture[top + step, left + 170] == 255).all()
    assert (picture[10:28, 10:300] < 200).any()  # the heading


def test_headings_wider_than_the_sheet_go_on_in_the_next_line() -> None:
    outputs = ", ".join(f"grade_of_the_tumour_{number} 0.125" for number in range(12))
    short, long = (np.asarray(Image.open(io.BytesIO(sheet_png([line], [])))) for line in ("a", outputs))
    assert long.shape[0] >= short.shape[0] + 2 * 18
    assert long.shape[1] == short.shape[1]
    assert (long[:, -10:] == 255).all()  # nothing runs off the edge
    assert (long[28:] < 200).any()
