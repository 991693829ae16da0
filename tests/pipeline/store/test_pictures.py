"""What is kept of a small slide's whole, and what is drawn of it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.store.pictures import LEAST_PX, drawn, small_mask, small_overview
from pipeline.tiling.cutting import encode
from pipeline.tiling.evidence import read_mask_png
from tests.synth import tissue_rgb

WIDTH, HEIGHT = 613, 487


@pytest.mark.parametrize("budget", [100_000, 4000, 1000, 1])
def test_an_overview_takes_no_more_than_it_may(budget: int) -> None:
    rgb = tissue_rgb(WIDTH, HEIGHT)
    data = small_overview(rgb, budget)
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    assert len(data) <= budget or width <= LEAST_PX
    assert width / height == pytest.approx(WIDTH / HEIGHT, rel=0.1)
    small = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BOX)).astype(int)
    assert np.abs(simplejpeg.decode_jpeg(data).astype(int) - small).mean() < 12


@pytest.mark.parametrize("budget", [10_000, 200, 1])
def test_a_mask_takes_no_more_than_it_may(budget: int) -> None:
    mask = tissue_rgb(WIDTH, HEIGHT)[..., 1] < 200
    data = small_mask(mask, budget)
    found = read_mask_png(data)
    assert len(data) <= budget or max(found.shape) <= LEAST_PX
    assert found.mean() == pytest.approx(mask.mean(), abs=0.05)
    if budget == 10_000:
        assert (found == mask).all()


def test_patches_are_drawn_over_the_overview() -> None:
    rgb = np.full((HEIGHT, WIDTH, 3), (200, 30, 30), np.uint8)
    kept = small_overview(np.full((HEIGHT, WIDTH, 3), (30, 30, 200), np.uint8), 10_000)
    corners = np.array([[0, 0], [448, 256], [600, 480]])  # the last one reaches over the edge
    patches = [encode(np.ascontiguousarray(rgb[:64, :64]), 90)] * 3
    picture = np.asarray(Image.open(io.BytesIO(drawn(kept, (WIDTH, HEIGHT), 2.0, patches, corners, 64.0))))
    assert picture.shape == (244, 306, 3)
    red = (picture[..., 0] > 150) & (picture[..., 2] < 80)
    assert red[2:30, 2:30].all()
    assert red[130:158, 226:254].all()
    assert red[242, 303]
    assert not red[40:120, 40:220].any()
