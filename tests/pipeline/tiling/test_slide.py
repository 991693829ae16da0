"""One slide to patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.slides.open import open_slide
from pipeline.tiling.slide import PatchRow, effective_mpp, tile_slide
from tests.synth import tissue_rgb, write_pyramid, zero_tile

RGB = tissue_rgb(1013, 787)


def spec(**fields: object) -> TilingConfig:
    return TilingConfig.model_validate({"patch_px": 64, "jpeg_quality": 95, **fields})


def patches(path: Path, tiling: TilingConfig, mpp: float | None = 0.5) -> list[PatchRow]:
    with open_slide(path) as reader:
        return list(tile_slide(reader, tiling, mpp).rows())


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tiff", RGB)


def test_every_patch_shows_its_place(slide: Path) -> None:
    rows = patches(slide, spec(tissue="none"))
    assert len(rows) == 16 * 13
    assert [(row.x, row.y) for row in rows[14:18]] == [(896, 0), (949, 0), (0, 64), (64, 64)]
    for row in rows[::7]:
        pixels = simplejpeg.decode_jpeg(row.image).astype(int)
        assert pixels.shape == (64, 64, 3)
        assert np.abs(pixels - RGB[row.y : row.y + 64, row.x : row.x + 64]).mean() < 5


def test_encoding_is_444_at_the_asked_quality(slide: Path) -> None:
    fine, coarse = patches(slide, spec(jpeg_quality=95))[0], patches(slide, spec(jpeg_quality=60))[0]
    assert simplejpeg.decode_jpeg_header(fine.image)[3] == "444"
    assert len(fine.image) > 1.5 * len(coarse.image)


def test_bytes_are_deterministic(slide: Path) -> None:
    assert patches(slide, spec()) == patches(slide, spec())


def test_slices_of_the_cells_give_the_same_rows(slide: Path) -> None:
    whole = patches(slide, spec())
    with open_slide(slide) as reader:
        tiling = tile_slide(reader, spec(), 0.5)
        n = len(tiling.cells)
        sliced = [list(tiling.rows(start, start + 29)) for start in range(0, n, 29)]
    assert [len(part) for part in sliced] == [29] * (n // 29) + [n % 29]
    assert [row for part in sliced for row in part] == whole


def test_tissue_filter_keeps_the_tissue(slide: Path) -> None:
    kept = {(row.x, row.y) for row in patches(slide, spec(min_tissue=0.5))}
    assert (4 * 64, 4 * 64) in kept  # in the large piece
    assert (13 * 64, 10 * 64) in kept  # in the small one
    assert (13 * 64, 2 * 64) not in kept  # its mirror image: glass
    everything = {(row.x, row.y) for row in patches(slide, spec(tissue="none"))}
    for x, y in everything:
        coloured = np.ptp(RGB[y : y + 64, x : x + 64].astype(int), axis=2) > 30
        if abs(coloured.mean() - 0.5) > 0.1:
            assert ((x, y) in kept) == (coloured.mean() > 0.5)


def test_a_coarser_level_is_read_as_it_is(slide: Path) -> None:
    rows = patches(slide, spec(mpp=1.0, tissue="none"))
    assert {row.level for row in rows} == {1}
    half = np.asarray(Image.fromarray(RGB).resize((506, 393), Image.Resampling.BOX)).astype(int)
    row = rows[8 + 2]  # second row of 8 columns, third column
    assert (row.x, row.y) == (round(128 * 1013 / 506), round(64 * 1013 / 506))
    assert np.abs(simplejpeg.decode_jpeg(row.image) - half[64:128, 128:192]).mean() < 8


def test_between_levels_the_finer_one_is_averaged(slide: Path) -> None:
    rows = patches(slide, spec(mpp=0.8, tissue="none"))
    assert {row.level for row in rows} == {0}
    row = rows[10 + 2]  # 102 px of level 0 a patch, 10 columns: second row, third column
    assert (row.x, row.y) == (204, 102)
    area = Image.fromarray(RGB[102:204, 204:306]).resize((64, 64), Image.Resampling.BOX)
    pixels = simplejpeg.decode_jpeg(row.image).astype(int)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels - np.asarray(area)).mean() < 3


def test_overlap(slide: Path) -> None:
    rows = patches(slide, spec(overlap_px=16, tissue="none"))
    assert [row.x for row in rows[:3]] == [0, 48, 96]


def test_plain_image_needs_no_mpp(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    tiling = spec(mpp=None, tissue="none", jpeg_quality=100)
    assert effective_mpp(None, tiling, None) is None
    rows = patches(tmp_path / "a.png", tiling, None)
    pixels = simplejpeg.decode_jpeg(rows[-1].image).astype(int)
    assert np.abs(pixels - RGB[rows[-1].y :, rows[-1].x :][:64, :64]).mean() < 1


def test_a_bad_tile_loses_its_patches_and_is_counted(slide: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tiff"
    bad.write_bytes(slide.read_bytes())
    zero_tile(bad, 0, 0)  # level-0 px 0..239
    with open_slide(bad) as reader:
        tiling = tile_slide(reader, spec(tissue="none", max_bad_tiles=0.1), 0.5)
        rows = list(tiling.rows())
    lost = [(x, y) for y in range(0, 256, 64) for x in range(0, 256, 64)]
    assert tiling.bad_tiles == lost
    assert rows == [row for row in patches(slide, spec(tissue="none")) if (row.x, row.y) not in lost]


def test_too_many_bad_tiles(slide: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tiff"
    bad.write_bytes(slide.read_bytes())
    zero_tile(bad, 0, 0)
    with pytest.raises(SlideError, match=r"11 of 208 patches .* tiling.max_bad_tiles=0.05") as caught:
        patches(bad, spec(tissue="none", max_bad_tiles=0.05))
    assert caught.value.reason == "bad-tiles"


def test_data_lost_in_the_overview_is_tried_not_taken_for_glass(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "flat.tiff", tissue_rgb(1409, 1103), levels=1)
    zero_tile(path, 0, 0)  # a corner of glass: unknown now, so its patches are tried and counted as lost
    with open_slide(path) as reader:
        tiling = tile_slide(reader, spec(max_bad_tiles=0.5), 0.5)
        rows = list(tiling.rows())
    assert len(tiling.bad_tiles) == 16
    assert rows


def test_no_tissue(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "blank.tiff", np.full((701, 503, 3), 244, np.uint8))
    with pytest.raises(SlideError, match=r"none of 88 patches is at least 25% tissue") as caught:
        patches(path, spec())
    assert caught.value.reason == "no-tissue"


def test_thumbnail(slide: Path) -> None:
    with open_slide(slide) as reader:
        thumbnail = tile_slide(reader, spec(), 0.5).thumbnail
    assert simplejpeg.decode_jpeg_header(thumbnail.jpeg)[:2] == thumbnail.rgb.shape[:2] == (398, 512)
    assert thumbnail.scale == pytest.approx(1013 / 512)


def test_an_override_of_zero_is_absurd() -> None:
    with pytest.raises(SlideError) as caught:
        effective_mpp((0.5, 0.5), spec(), 0.0)
    assert caught.value.reason == "absurd-mpp"


def test_effective_mpp_takes_override_then_file_then_default() -> None:
    tiling = spec(default_mpp=0.25)
    assert effective_mpp((0.5, 0.5), tiling, 0.3) == 0.3
    assert effective_mpp((0.5, 0.5), tiling, None) == 0.5
    assert effective_mpp(None, tiling, None) == 0.25


@pytest.mark.parametrize(("x", "y"), [(0.25, 0.5), (0.5, 0.25), (0.5, 0.511), (0.511, 0.5)])
def test_px_that_are_not_square_are_refused_and_an_override_says_that_they_are(x: float, y: float) -> None:
    with pytest.raises(SlideError, match=rf"states {x:g} microns .* along x and {y:g} along y.*mpp column") as caught:
        effective_mpp((x, y), spec(default_mpp=0.5), None)
    assert caught.value.reason == "mpp-not-square"
    assert effective_mpp((x, y), spec(), 0.3) == 0.3
    assert effective_mpp((x, y), spec(mpp=None), None) is None


def test_px_that_are_square_but_for_rounding_have_the_mean() -> None:
    assert effective_mpp((0.5, 0.508), spec(), None) == pytest.approx(0.503984, abs=1e-6)


@pytest.mark.parametrize("stated", [None, (352.8, 352.8), (0.001, 0.001)])
def test_missing_or_absurd_mpp(stated: tuple[float, float] | None) -> None:
    with pytest.raises(SlideError, match="cohort's mpp column") as caught:
        effective_mpp(stated, spec(), None)
    assert caught.value.reason == ("missing-mpp" if stated is None else "absurd-mpp")
    assert effective_mpp(stated, spec(), 0.5) == 0.5


def test_an_absurd_mpp_is_not_replaced_by_the_default() -> None:
    with pytest.raises(SlideError):
        effective_mpp((352.8, 352.8), spec(default_mpp=0.5), None)


def test_one_level_only_is_averaged_from_far(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", RGB, levels=1)
    with open_slide(path) as reader:
        tiling = tile_slide(reader, spec(mpp=2.0, tissue="none"), 0.5)
        row = list(tiling.rows())[5]
    assert (tiling.grid.level, tiling.grid.read_px, row.x, row.y) == (0, 256, 256, 256)
    area = Image.fromarray(RGB[256:512, 256:512]).resize((64, 64), Image.Resampling.BOX)
    assert np.abs(simplejpeg.decode_jpeg(row.image).astype(int) - np.asarray(area)).mean() < 3


def test_a_slide_of_one_pixel_is_too_small(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", np.full((1, 1, 3), 99, np.uint8), levels=1)
    with pytest.raises(SlideError, match="1 x 1 px") as caught:
        patches(path, spec(edge="drop"))
    assert caught.value.reason == "too-small"


def test_a_tiff_without_tiles_is_a_plain_image(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.tiff")
    rows = patches(tmp_path / "a.tiff", spec(mpp=None, tissue="none", jpeg_quality=100), None)
    assert len(rows) == 16 * 13
    pixels = simplejpeg.decode_jpeg(rows[-1].image).astype(int)
    assert np.abs(pixels - RGB[rows[-1].y :, rows[-1].x :][:64, :64]).mean() < 1


def test_more_patches_than_are_announced_at_a_time(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = patches(slide, spec())
    monkeypatch.setattr("pipeline.tiling.slide.ANNOUNCED", 7)
    assert patches(slide, spec()) == whole
