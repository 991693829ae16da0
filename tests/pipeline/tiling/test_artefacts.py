"""What is coloured and no tissue: ink, tinted glass, edges of the glass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from pipeline.slides.open import open_slide
from pipeline.tiling import windows
from pipeline.tiling.artefacts import artefact_mask, ink_mask, smooth_mask
from pipeline.tiling.tissue import find_tissue, glass_colour
from tests.bench.tissue import PICTURES, measure, read


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
    coloured = find_tissue(rgb).mask
    artefact = artefact_mask(rgb, coloured)
    assert coloured[pen].all()
    assert artefact[pen].all()
    assert not artefact[tissue].any()
    assert not (artefact & ~coloured).any()
    assert not (coloured & ~artefact & ~ndimage.binary_dilation(tissue, np.ones((3, 3)))).any()  # no rim left


def test_tinted_glass_is_no_tissue_and_the_tissue_on_it_stays() -> None:
    rgb, _, tissue = _pen_and_tissue(0.6)
    tinted = rgb.astype(int)
    tinted[~tissue] = [235, 228, 190]  # yellow all over, from a filter or old mounting medium
    tinted = np.clip(tinted + np.random.default_rng(2).normal(0, 0.6, (*tissue.shape, 1)), 0, 255).astype(np.uint8)
    assert glass_colour(tinted) == pytest.approx((235, 228, 190), abs=1)
    coloured = find_tissue(tinted).mask
    left = coloured & ~artefact_mask(tinted, coloured)
    assert left[tissue].mean() > 0.97
    assert left[~tissue].mean() < 0.02  # a rim of px mixed with tissue


def test_a_stain_on_the_glass_without_texture_is_an_artefact() -> None:
    rgb, _, tissue = _pen_and_tissue(0.6)
    stained = rgb.copy()
    stained[60:240, 50:140] = (238, 225, 180)  # old mounting medium on part of the glass, so that glass is white
    coloured = find_tissue(stained).mask
    assert coloured[62:238, 52:138].all()
    left = coloured & ~artefact_mask(stained, coloured)
    assert not left[62:238, 52:138].any()
    assert left[tissue].mean() > 0.97


STAINS = {"haematoxylin": (0.65, 0.70, 0.29), "eosin": (0.07, 0.99, 0.11), "DAB": (0.27, 0.57, 0.78)}
INKS = {
    "teal": (60, 180, 150),
    "green": (30, 120, 50),
    "blue": (40, 80, 190),
    "red": (200, 20, 30),
    "black": (25, 22, 20),
}


def _spots(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Amounts of stain (h, w, 1) that vary from px to px as nuclei do."""
    return np.asarray(0.15 + 0.6 * generator.random((*shape, 1)))


@given(first=st.sampled_from(list(STAINS)), second=st.sampled_from(list(STAINS)), share=st.floats(0, 1))
def test_no_mixture_of_stains_is_ink(first: str, second: str, share: float) -> None:
    """As Beer and Lambert say: amounts of stain times their vectors, on glass of any tint."""
    generator = np.random.default_rng(3)
    vector = share * np.array(STAINS[first]) + (1 - share) * np.array(STAINS[second])
    rgb = np.full((97, 131, 3), 243.0)
    rgb[20:80, 30:110] *= 10 ** -(_spots(generator, (60, 80)) * vector)
    picture = np.rint(rgb).astype(np.uint8)
    assert not ink_mask(picture)[22:78, 32:108].any()
    assert find_tissue(picture).mask[22:78, 32:108].all()


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("width", [2, 3, 11])
def test_ink_that_varies_as_tissue_does_is_no_tissue(ink: str, width: int) -> None:
    """Thin strokes and thick ones, at densities that change along the stroke by a third."""
    generator = np.random.default_rng(4)
    rgb = 243 + generator.normal(0, 0.5, (141, 173, 3))
    stroke, tissue = np.zeros((2, 141, 173), bool)
    for start in range(20, 120):
        stroke[start, start + 15 : start + 15 + width] = True
    tissue[15:60, 80:150] = True
    stain = np.array(STAINS["haematoxylin"]) + STAINS["eosin"]
    rgb[tissue] *= 10 ** -(0.5 * _spots(generator, rgb.shape[:2]) * stain)[tissue]
    amount = 0.75 + 0.25 * generator.random((141, 173, 1))
    over = 243 * (np.array(INKS[ink]) / 243) ** amount
    rgb[stroke & ~tissue] = over[stroke & ~tissue]
    picture = np.clip(np.rint(rgb), 0, 255).astype(np.uint8)
    coloured = find_tissue(picture).mask
    left = coloured & ~artefact_mask(picture, coloured)
    assert left[stroke & ~tissue].mean() < 0.1
    assert left[tissue & ~ndimage.binary_dilation(stroke, iterations=2)].mean() > 0.99


def test_bands_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(8)
    blocks = generator.integers(40, 250, (23, 17, 3)).repeat(9, axis=0).repeat(9, axis=1)
    rgb = np.clip(blocks + generator.normal(0, 2, blocks.shape), 0, 255).astype(np.uint8)
    coloured = find_tissue(rgb).mask
    whole = ink_mask(rgb), smooth_mask(rgb, coloured)
    assert all(0.02 < mask.mean() < 0.98 for mask in (*whole, coloured))
    monkeypatch.setattr(windows, "BAND", 13)
    assert np.array_equal(ink_mask(rgb), whole[0])
    assert np.array_equal(smooth_mask(rgb, coloured), whole[1])
    assert np.array_equal(find_tissue(rgb).mask, coloured)


@pytest.mark.parametrize(("ink", "found"), [("teal", 0.9), ("red", 0.9), ("black", 0.9)])
def test_ink_over_tissue_is_no_tissue(ink: str, found: float) -> None:
    generator = np.random.default_rng(4)
    rgb = np.full((141, 173, 3), 243.0)
    rgb[20:120, 30:150] *= 10 ** -(0.3 * _spots(generator, (100, 120)) * (np.array(STAINS["eosin"])))
    rgb[60:75] *= np.array(INKS[ink]) / 243
    picture = np.rint(rgb).astype(np.uint8)
    coloured = find_tissue(picture).mask
    left = coloured & ~artefact_mask(picture, coloured)
    assert left[61:74, 32:148].mean() < 1 - found
    assert left[22:57, 32:148].mean() > 0.97


def test_specks_too_small_to_judge_stay() -> None:
    rgb = np.full((61, 83, 3), 240, np.uint8)
    rgb[20:22, 30:32] = (210, 120, 180)
    coloured = find_tissue(rgb).mask
    assert coloured.any()
    assert not artefact_mask(rgb, coloured).any()


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
@pytest.mark.parametrize("px", [97, 512])
def test_real_tissue_is_no_artefact_at_any_scale(shared_slides: Path, name: str, px: int) -> None:
    with open_slide(shared_slides / name) as reader:
        rgb = reader.overview(px).rgb
    found = find_tissue(rgb)
    above = find_tissue(rgb, found.threshold).mask
    assert above.mean() > 0.3
    assert (smooth_mask(rgb, found.mask) & above).sum() <= 0.001 * above.sum()
    assert (ink_mask(rgb) & above).sum() <= 0.015 * above.sum()  # the first one has blue ink at its margin


@pytest.mark.parametrize("name", PICTURES)
def test_of_real_ink_a_tenth_is_left_at_most_and_of_real_tissue_a_fiftieth_is_lost(
    shared_overviews: Path, name: str
) -> None:
    line = measure(shared_overviews / f"{name}.png")
    assert line.met, line
    assert line.ink_above is None or line.ink_above > 0.15  # colour alone does not tell them apart


@pytest.mark.parametrize("reduced", [2, 4])
@pytest.mark.parametrize("name", [name for name, seen in PICTURES.items() if not (seen.inks or seen.sections)])
def test_real_tissue_stays_at_coarser_resolution(shared_overviews: Path, name: str, reduced: int) -> None:
    rgb = np.asarray(Image.fromarray(read(shared_overviews / f"{name}.png")).reduce(reduced))
    coloured = find_tissue(rgb).mask
    assert artefact_mask(rgb, coloured).sum() <= 0.02 * coloured.sum()


def test_the_pale_part_of_a_faint_section_is_tissue_and_its_fat_with_closing(shared_overviews: Path) -> None:
    line = measure(shared_overviews / "dero-21-rgb.png")
    assert line.outlined is not None
    above, tissue, closed = line.outlined
    assert above < 0.5
    assert tissue > 0.75
    assert closed > 0.85
