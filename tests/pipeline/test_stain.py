from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.stain import STAINS, jittered

NONE, SAME = np.zeros(3, np.float32), np.ones(3, np.float32)


def _noise(h: int = 5, w: int = 7) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)


def test_no_jitter_is_no_change() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for pixels in (every, _noise()):
        np.testing.assert_array_equal(jittered(pixels, SAME, NONE), pixels)


@given(st.lists(st.floats(0.8, 1.2), min_size=3, max_size=3), st.lists(st.floats(-0.2, 0.2), min_size=3, max_size=3))
def test_it_is_beer_lambert_pixel_by_pixel(scale: list[float], shift: list[float]) -> None:
    """The textbook way: amounts of stain by solving for them, changed, and turned back into light."""
    pixels = _noise()
    unit = [row / np.linalg.norm(row) for row in STAINS]
    expected = np.empty(pixels.shape)
    for y, x in np.ndindex(pixels.shape[:2]):
        density = -np.log((pixels[y, x].astype(float) + 1) / 256)
        amounts = np.linalg.solve(np.array(unit).T, density) * scale + shift
        expected[y, x] = np.exp(-sum(a * u for a, u in zip(amounts, unit, strict=True))) * 256 - 1
    found = jittered(pixels, np.array(scale, np.float32), np.array(shift, np.float32))
    assert np.abs(found - expected.clip(0, 255)).max() <= 0.51


def test_more_haematoxylin_makes_its_own_colour_darker_and_no_other() -> None:
    blue = (np.exp(-STAINS[0] / np.linalg.norm(STAINS[0])) * 255).astype(np.uint8)[None, None]
    stronger = jittered(blue, np.array([1.2, 1, 1], np.float32), NONE).astype(int)
    assert (stronger < blue).all()
    assert np.abs(jittered(blue, np.array([1, 1.2, 1], np.float32), NONE).astype(int) - blue).max() <= 1


@pytest.mark.parametrize("colour", [0, 255])
def test_black_and_white_stay_in_range(colour: int) -> None:
    pixels = np.full((2, 3, 3), colour, np.uint8)
    for shift in (-0.5, 0.5):
        assert jittered(pixels, SAME * np.float32(1.5), NONE + np.float32(shift)).dtype == np.uint8
