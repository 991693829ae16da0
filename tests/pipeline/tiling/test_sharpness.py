"""How sharp a patch is: exactly by its definition, less where it is blurred, and what lies beyond the slide apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.config.data import TilingConfig
from pipeline.errors import BadTileError, SlideError
from pipeline.slides.open import open_slide
from pipeline.tiling.cutting import encode
from pipeline.tiling.sharpness import BINS, bin_edge, bin_of, bin_place, histogram, laplacian_variance, sharpness
from pipeline.tiling.slide import PatchRow, SlideTiling, tile_slide
from tests.oracle import sharpness_by_px
from tests.synth import tissue_rgb, write_pyramid


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 11), st.integers(0, 2**32 - 1), st.sampled_from([2, 256]))
def test_it_is_exactly_what_its_definition_says(height: int, width: int, seed: int, levels: int) -> None:
    drawn = np.random.default_rng(seed).integers(0, levels, (height, width, 3))
    rgb = (drawn * (255 // (levels - 1))).astype(np.uint8)
    assert laplacian_variance(rgb) == float(sharpness_by_px(rgb))


def test_the_largest_one_is_counted_too() -> None:
    board = np.zeros((8, 9, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 255
    assert laplacian_variance(board) == 1020**2
    assert laplacian_variance(255 - board) == 1020**2
    assert bin_of(1020.0**2) == BINS - 1
    assert laplacian_variance(np.full((8, 9, 3), 255, np.uint8)) == 0


@given(st.floats(0, 2e6))
def test_bins_lie_between_their_edges(value: float) -> None:
    number = bin_of(value)
    assert bin_edge(number) * (1 - 1e-9) <= value or number == 0
    assert value <= bin_edge(number + 1) * (1 + 1e-9) or number == BINS - 1
    assert bin_place(value) == pytest.approx(4 * np.log2(value + 1))
    (at,) = np.flatnonzero(histogram(np.array([value], np.float32)))
    assert at in {number, bin_of(float(np.float32(value)))}


def test_a_real_slide_is_sharper_than_its_blurred_copies(shared_slides: Path) -> None:
    """Patch by patch, whatever the stain; and blur weighs more than the quality of the JPEG."""
    with openslide.OpenSlide(str(shared_slides / "CMU-1-Small-Region.svs")) as slide:
        rgb = np.asarray(slide.read_region((640, 900), 0, (512, 768)).convert("RGB"))
    found = {}
    for sigma in (0.0, 0.7, 1.0, 1.5, 2.0, 3.0):
        blurred = np.rint(ndimage.gaussian_filter(rgb.astype(np.float32), (sigma, sigma, 0))).astype(np.uint8)
        corners = [(x, y) for y in range(0, 768, 256) for x in range(0, 512, 256)]
        found[sigma] = [sharpness(encode(blurred[y : y + 256, x : x + 256], 90), 256, 256) for x, y in corners]
    values = np.array(list(found.values()))
    assert (values[1:] < values[:-1]).all()
    assert (values[2] < values[0] / 2).all()  # sigma 1 px = 0.5 um


def planned(path: Path, **fields: object) -> tuple[list[PatchRow], SlideTiling]:
    spec = TilingConfig.model_validate({"patch_px": 64, "tissue": "none", "max_bad_tiles": 0.9, **fields})
    with open_slide(path) as reader:
        tiling = tile_slide(reader, spec, 0.5)
        return list(tiling.rows()), tiling


def test_what_lies_beyond_the_slide_is_no_detail(tmp_path: Path) -> None:
    """A patch of one colour that reaches over the edge has none, though it ends there in glass."""
    path = write_pyramid(tmp_path / "a.tiff", np.full((150, 170, 3), (150, 60, 120), np.uint8), levels=1)
    rows, tiling = planned(path, edge="pad", min_sharpness=0, mpp=0.7, mpp_tolerance=0)
    assert int(tiling.grid.read_px) != int(tiling.grid.patch_px)
    whole = [sharpness(row.image, 64, 64) for row in rows]
    assert max(whole) > 100
    assert max(row.sharpness or 0 for row in rows) < 3


def test_patches_below_the_threshold_are_left_out(tmp_path: Path) -> None:
    rgb = tissue_rgb(613, 487)
    rgb[:, 300:] = np.rint(ndimage.gaussian_filter(rgb[:, 300:].astype(float), (4, 4, 0))).astype(np.uint8)
    path = write_pyramid(tmp_path / "a.tiff", rgb, levels=1)
    unasked, _ = planned(path)
    assert {row.sharpness for row in unasked} == {None}
    measured, _ = planned(path, min_sharpness=0)
    assert [(row.cell, row.image) for row in measured] == [(row.cell, row.image) for row in unasked]
    by_definition = [float(sharpness_by_px(_decoded(row.image))) for row in measured[:3]]
    assert [row.sharpness for row in measured[:3]] == by_definition
    limit = float(np.median([row.sharpness or 0 for row in measured]))
    kept, tiling = planned(path, min_sharpness=limit)
    assert kept == [row for row in measured if (row.sharpness or 0) >= limit]
    assert sorted(tiling.blurred) == sorted(row.sharpness for row in measured if (row.sharpness or 0) < limit)  # type: ignore[type-var]
    with pytest.raises(SlideError, match=r"none of 80 patches has tiling.min_sharpness=1e\+06") as bad:
        planned(path, min_sharpness=1e6)[1].check_sharp(0)
    assert bad.value.reason == "blurred"


def test_surroundings_beside_a_patch_do_not_count(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(613, 487), levels=2)
    alone, _ = planned(path, min_sharpness=0)
    beside, _ = planned(path, min_sharpness=0, context_mpp=2.0)
    assert [row.sharpness for row in beside] == [row.sharpness for row in alone]
    assert all(len(one.image) > len(other.image) for one, other in zip(beside, alone, strict=True))


def _decoded(jpeg: bytes) -> np.ndarray:
    import simplejpeg

    return np.asarray(simplejpeg.decode_jpeg(jpeg))


def test_a_tile_that_was_taken_without_a_look_is_lost_where_it_cannot_be_decoded(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(613, 487), levels=1)
    _, tiling = planned(path, min_sharpness=0)
    with pytest.raises(BadTileError, match="level 0, x 64, y 128"), open_slide(path) as reader:
        tiling.attached(reader)._sharpness(b"\xff\xd8 no patch", 64, 128)
