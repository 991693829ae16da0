from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bags.stain import STAINS, Floats, jittered

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
NONE, SAME = np.zeros(3, np.float32), np.ones(3, np.float32)


def _noise(h: int = 5, w: int = 7) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)


def _alone(pixels: Pixels, scale: Floats, shift: Floats) -> Pixels:
    """One patch (h, w, 3) through `jittered`."""
    patch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    found: Pixels = jittered(patch, scale[None], shift[None])[0].permute(1, 2, 0).numpy()
    return found


def test_no_jitter_is_no_change() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for pixels in (every, _noise()):
        np.testing.assert_array_equal(_alone(pixels, SAME, NONE), pixels)


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
    found = _alone(pixels, np.array(scale, np.float32), np.array(shift, np.float32))
    assert np.abs(found - expected.clip(0, 255)).max() <= 0.51


def test_a_patch_s_bits_do_not_depend_on_its_neighbours() -> None:
    """13 x 17 px: no patch but the first begins where a vector does."""
    rng = np.random.default_rng(1)
    patches = torch.from_numpy(rng.integers(0, 256, (21, 13, 17, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    scale = rng.uniform(0.7, 1.3, (21, 3)).astype(np.float32)
    shift = rng.uniform(-0.3, 0.3, (21, 3)).astype(np.float32)
    whole = jittered(patches, scale, shift)
    for rows in ([4], [20, 3], [7, 8, 9]):
        assert torch.equal(jittered(patches[rows], scale[rows], shift[rows]), whole[rows])


def test_more_haematoxylin_makes_its_own_colour_darker_and_no_other() -> None:
    blue = (np.exp(-STAINS[0] / np.linalg.norm(STAINS[0])) * 255).astype(np.uint8)[None, None]
    stronger = _alone(blue, np.array([1.2, 1, 1], np.float32), NONE).astype(int)
    assert (stronger < blue).all()
    assert np.abs(_alone(blue, np.array([1, 1.2, 1], np.float32), NONE).astype(int) - blue).max() <= 1


@pytest.mark.parametrize("colour", [0, 255])
def test_black_and_white_stay_in_range(colour: int) -> None:
    pixels = np.full((2, 3, 3), colour, np.uint8)
    lighter, darker = (_alone(pixels, SAME * np.float32(1.5), NONE + np.float32(shift)) for shift in (-0.5, 0.5))
    assert (lighter == colour).all()
    assert (darker <= min(colour, 155)).all()
