"""The tissue mask and its exact shares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.slides.open import open_slide
from pipeline.tiling.tissue import artefact_mask, integral_image, otsu, tissue_fraction, tissue_mask
from tests.synth import tissue_rgb


def test_mask_finds_both_pieces_and_no_glass() -> None:
    mask = tissue_mask(tissue_rgb(211, 163))
    assert mask.dtype == np.bool_
    assert mask[int(0.4 * 163), int(0.35 * 211)]
    assert mask[int(0.83 * 163), int(0.82 * 211)]
    assert not mask[int(0.2 * 163), int(0.85 * 211)]
    assert 0.25 < mask.mean() < 0.40


@pytest.mark.parametrize("grey", [0, 30, 244, 255])
def test_blank_noise_has_no_tissue(grey: int) -> None:
    noise = np.random.default_rng(0).normal(grey, 3, (167, 211, 3))
    assert tissue_mask(np.clip(noise, 0, 255).astype(np.uint8)).mean() == 0


def test_half_a_percent_of_tissue_on_a_blank_slide_is_found() -> None:
    rgb = np.clip(np.random.default_rng(1).normal(240, 3, (401, 503, 3)), 0, 255).astype(np.uint8)
    rgb[300:328, 100:136] = (210, 150, 190)  # 0.5% of the area
    mask = tissue_mask(rgb)
    assert mask[302:326, 102:134].all()
    assert mask.mean() == pytest.approx(28 * 36 / (401 * 503), rel=0.2)


def test_pale_and_dark_tissue_without_glass_is_all_tissue() -> None:
    rgb = np.empty((101, 127, 3), np.uint8)
    rgb[:, :60] = (225, 185, 205)  # pale stroma
    rgb[:, 60:] = (90, 30, 120)  # nuclei: Otsu's threshold alone lies between the two
    assert otsu((rgb.max(2) - rgb.min(2)).astype(np.float32)) >= 40
    assert tissue_mask(rgb).all()


def test_otsu_separates_two_classes() -> None:
    values = np.concatenate([np.full(700, 20), np.full(300, 90)]).astype(np.float32)
    assert 20 <= otsu(values) < 90


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


def _pen_and_tissue(noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Glass with a green stroke along two edges and a piece of tissue: rgb, pen, tissue."""
    generator = np.random.default_rng(5)
    rgb = 240 + generator.normal(0, noise, (251, 349, 1)) * np.ones(3)
    pen, tissue = np.zeros((2, 251, 349), bool)
    pen[20:38, 30:300] = pen[38:200, 30:41] = True
    tissue[120:190, 150:260] = True
    rgb[pen] = np.array([40, 110, 60]) + generator.normal(0, noise, (pen.sum(), 1))
    rgb[tissue] = np.array([200, 120, 170]) + generator.normal(0, 9, (tissue.sum(), 1))
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8), pen, tissue


@pytest.mark.parametrize("noise", [0.0, 0.8])
def test_pen_is_an_artefact_and_tissue_is_not(noise: float) -> None:
    rgb, pen, tissue = _pen_and_tissue(noise)
    coloured = tissue_mask(rgb)
    artefact = artefact_mask(rgb, coloured)
    assert coloured[pen].all()
    assert artefact[pen].all()
    assert not artefact[tissue].any()
    assert not (artefact & ~coloured).any()
    assert not (coloured & ~artefact & ~ndimage.binary_dilation(tissue, np.ones((3, 3)))).any()  # no rim left


def test_tinted_glass_is_an_artefact_and_the_tissue_on_it_stays() -> None:
    rgb, _, tissue = _pen_and_tissue(0.6)
    tinted = rgb.astype(int)
    tinted[~tissue] = [235, 228, 190]  # yellow all over, from a filter or old mounting medium
    tinted = np.clip(tinted + np.random.default_rng(2).normal(0, 0.6, (*tissue.shape, 1)), 0, 255).astype(np.uint8)
    coloured = tissue_mask(tinted)
    left = coloured & ~artefact_mask(tinted, coloured)
    assert coloured.mean() > 0.9
    assert left[tissue].mean() > 0.97
    assert left[~tissue].mean() < 0.02  # a rim of px mixed with tissue


def test_specks_too_small_to_judge_stay() -> None:
    rgb = np.full((61, 83, 3), 240, np.uint8)
    rgb[20:22, 30:32] = (210, 120, 180)
    coloured = tissue_mask(rgb)
    assert coloured.any()
    assert not artefact_mask(rgb, coloured).any()


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
@pytest.mark.parametrize("px", [97, 512])
def test_real_tissue_has_texture_at_any_scale(shared_slides: Path, name: str, px: int) -> None:
    with open_slide(shared_slides / name) as reader:
        rgb = reader.overview(px).rgb
    coloured = tissue_mask(rgb)
    assert coloured.mean() > 0.3
    assert artefact_mask(rgb, coloured).sum() <= 0.001 * coloured.sum()
