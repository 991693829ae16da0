"""The tissue mask and its exact shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.tiling.tissue import (
    closed,
    find_tissue,
    glass_colour,
    integral_image,
    level_counts,
    otsu,
    tissue_fraction,
)
from tests.synth import tissue_rgb


def test_mask_finds_both_pieces_and_no_glass() -> None:
    mask = find_tissue(tissue_rgb(211, 163)).mask
    assert mask.dtype == np.bool_
    assert mask[int(0.4 * 163), int(0.35 * 211)]
    assert mask[int(0.83 * 163), int(0.82 * 211)]
    assert not mask[int(0.2 * 163), int(0.85 * 211)]
    assert 0.25 < mask.mean() < 0.40


@pytest.mark.parametrize("grey", [0, 30, 244, 255])
def test_blank_noise_has_no_tissue(grey: int) -> None:
    noise = np.random.default_rng(0).normal(grey, 3, (167, 211, 3))
    assert find_tissue(np.clip(noise, 0, 255).astype(np.uint8)).mask.mean() == 0


def test_half_a_percent_of_tissue_on_a_blank_slide_is_found() -> None:
    rgb = np.clip(np.random.default_rng(1).normal(240, 3, (401, 503, 3)), 0, 255).astype(np.uint8)
    rgb[300:328, 100:136] = (210, 150, 190)  # 0.5% of the area
    mask = find_tissue(rgb).mask
    assert mask[302:326, 102:134].all()
    assert mask.mean() == pytest.approx(28 * 36 / (401 * 503), rel=0.2)


def test_pale_and_dark_tissue_without_glass_is_all_tissue() -> None:
    rgb = np.empty((101, 127, 3), np.uint8)
    rgb[:, :60] = (225, 185, 205)  # pale stroma
    rgb[:, 60:] = (90, 30, 120)  # nuclei: Otsu's threshold alone lies between the two
    assert otsu(level_counts((rgb.max(2) - rgb.min(2)).astype(np.float32))) >= 40
    assert find_tissue(rgb).mask.all()


def test_otsu_separates_two_classes() -> None:
    counts = np.zeros(256, np.int64)
    counts[[20, 90]] = 700, 300
    assert 20 <= otsu(counts) < 90


@given(
    seed=st.integers(0, 10_000),
    left=st.integers(0, 20),
    top=st.integers(0, 14),
    width=st.integers(1, 16),
    height=st.integers(1, 14),
)
def test_fraction_of_whole_boxes_is_the_mean(seed: int, left: int, top: int, width: int, height: int) -> None:
    mask = np.random.default_rng(seed).random((29, 37)) < 0.4
    box = np.array([[left, top, left + width, top + height]], float)
    want = mask[top : top + height, left : left + width].mean()
    assert tissue_fraction(integral_image(mask), box)[0] == pytest.approx(want, abs=1e-9)


def test_fraction_of_fractional_boxes_is_exact() -> None:
    mask = np.zeros((5, 7), bool)
    mask[2, 3] = True
    boxes = np.array([[3.25, 2.5, 4.25, 3.5], [2.5, 1.5, 4.5, 3.5], [0, 0, 7, 5], [6.5, 4.5, 7, 5]], float)
    assert tissue_fraction(integral_image(mask), boxes) == pytest.approx([0.75 * 0.5, 0.25, 1 / 35, 0.0])


@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.95), gap=st.floats(1, 9))
def test_closing_is_dilation_and_erosion_with_a_disc(seed: int, share: float, gap: float) -> None:
    mask = np.random.default_rng(seed).random((31, 37)) < share
    reach = range(-5, 6)
    disc = np.array([[np.hypot(x, y) <= gap / 2 for x in reach] for y in reach])
    wide = ndimage.binary_dilation(mask, disc)
    want = mask | ndimage.binary_erosion(wide, disc, border_value=1)
    assert (closed(mask, np.full((31, 37, 3), 240, np.uint8), gap) == want).all()
    assert not (closed(mask, np.full((31, 37, 3), 90, np.uint8), gap) & ~mask).any()  # dark: no gap


def test_faint_tissue_counts_where_it_hangs_together_with_some_that_is_not() -> None:
    generator = np.random.default_rng(6)
    rgb = np.full((151, 203, 3), 246.0)
    amount = 0.01 + 0.06 * generator.random((151, 203, 1))
    faint = np.zeros((2, 151, 203), bool)
    faint[0, 20:120, 20:90] = faint[1, 20:120, 130:190] = True
    stained = rgb * 10 ** -(amount * np.array([0.65, 0.70, 0.29]))
    rgb = np.where((faint[0] | faint[1])[..., None], stained, rgb)
    rgb[60:90, 40:70] = (190, 120, 175)
    picture = np.rint(rgb).astype(np.uint8)
    found = find_tissue(picture)
    assert found.mask[faint[0]].mean() > 0.9
    assert not (found.mask & ~ndimage.binary_dilation(faint[0], np.ones((3, 3)))).any()  # nor the other one, nor a rim
    above = find_tissue(picture, found.threshold).mask
    assert above[faint[0]].mean() < 0.3


def test_glass_of_any_tint_is_white_and_tissue_is_not_glass() -> None:
    rgb = tissue_rgb(211, 163)
    assert glass_colour(rgb) == pytest.approx((244, 244, 244), abs=1)
    tinted = np.rint(rgb * np.array([0.95, 0.93, 0.8])).astype(np.uint8)
    assert glass_colour(tinted) == pytest.approx((232, 227, 195), abs=1)
    agree = find_tissue(tinted).mask == find_tissue(rgb).mask
    assert agree.mean() > 0.99
    assert glass_colour(np.full((9, 9, 3), (225, 185, 205), np.uint8)) == (255, 255, 255)
