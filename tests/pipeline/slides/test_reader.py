"""What every reader offers: an overview, read in blocks, that says what it could not read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.slides import reader as slide_reader
from pipeline.slides.open import open_slide
from pipeline.slides.openslide import OpenSlideReader
from pipeline.slides.reader import UNREAD, SlideReader, on_background
from tests.synth import tissue_rgb, write_pyramid, zero_tile

RGB = tissue_rgb(1013, 787)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "a.tiff", RGB)


@pytest.mark.parametrize("max_px", [64, 500, 1013, 5000])
def test_overview_is_the_slide_in_small(slide: Path, max_px: int) -> None:
    with open_slide(slide) as reader:
        overview = reader.overview(max_px)
    height, width, _ = overview.rgb.shape
    assert max(width, height) == min(max_px, 1013)
    assert overview.scale * width == pytest.approx(1013)
    assert overview.scale * height == pytest.approx(787, abs=1.5 * overview.scale)
    small = np.asarray(Image.fromarray(RGB).resize((width, height), Image.Resampling.BOX)).astype(int)
    assert np.abs(overview.rgb - small).mean() < 3
    assert not overview.unread.any()


def test_overview_of_one_level_is_read_in_blocks(tmp_path: Path) -> None:
    rgb = tissue_rgb(1409, 1103)
    path = write_pyramid(tmp_path / "flat.tiff", rgb, levels=1)
    with open_slide(path) as reader:
        overview = reader.overview(313)
    small = np.asarray(Image.fromarray(rgb).resize((313, 245), Image.Resampling.BOX)).astype(int)
    assert overview.rgb.shape == small.shape
    assert np.abs(overview.rgb - small).mean() < 3


def test_overview_marks_what_it_could_not_read(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "flat.tiff", tissue_rgb(1409, 1103), levels=1)
    zero_tile(path, 0, 0)
    with open_slide(path) as reader:
        overview = reader.overview(500)
    assert overview.unread[0, 0]
    assert overview.unread.mean() == pytest.approx(240 * 240 / (1409 * 1103), rel=0.3)
    assert (overview.rgb[:85, :85] == UNREAD).all()
    assert not overview.unread[110:].any()


def test_overview_of_a_small_slide_survives_a_bad_tile(slide: Path) -> None:
    zero_tile(slide, 0, 0)
    with open_slide(slide) as reader:
        overview = reader.overview(1013)
    assert overview.unread[:240, :240].all()
    assert not overview.unread[300:].any()


def test_the_longer_edge_of_an_overview(slide: Path) -> None:
    with open_slide(slide) as reader:
        assert reader.overview(100).rgb.shape == (78, 100, 3)


def test_one_reader_sees_what_the_other_does(slide: Path) -> None:
    with open_slide(slide) as ours, OpenSlideReader(slide) as theirs:
        assert np.array_equal(ours.overview(1013).rgb, theirs.overview(1013).rgb)
        assert np.abs(ours.overview(300).rgb.astype(int) - theirs.overview(300).rgb).mean() < 1


def test_a_reader_without_tiles_says_so(slide: Path) -> None:
    with OpenSlideReader(slide) as reader:
        assert isinstance(reader, SlideReader)
        assert reader.native_tiles(0) is None
        reader.expect(0, np.array([[0, 0, 10, 10]]))
        with pytest.raises(NotImplementedError, match="OpenSlideReader"):
            reader.raw_tile(0, 1, 2)


def test_colours_over_a_background() -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    found = on_background(rgba, np.array([255, 255, 255], np.uint8))
    assert found.tolist() == [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]]


@pytest.mark.parametrize("opened", [open_slide, OpenSlideReader])
@pytest.mark.parametrize("max_px", [130, 250, 253])
def test_what_a_coarse_level_has_lost_is_read_from_the_next_finer_one(
    slide: Path, max_px: int, opened: Callable[[Path], SlideReader]
) -> None:
    """Level 2 has 253 x 196 px in two tiles; of level 1 a tile is lost too, and that part comes from level 0."""
    with opened(slide) as reader:
        sound = reader.overview(max_px)
    for level, tile in ((2, 0), (2, 1), (1, 1)):
        zero_tile(slide, level, tile)
    with opened(slide) as reader:
        overview = reader.overview(max_px)
    assert not overview.unread.any()
    assert overview.scale == sound.scale
    assert np.abs(overview.rgb.astype(int) - sound.rgb).mean() < 2  # one px off: 4
    for tile in (0, 1, 2, 7):
        zero_tile(slide, 0, tile)
    with opened(slide) as reader:
        overview = reader.overview(max_px)
    y, x = np.argwhere(overview.unread).T * overview.scale
    assert (x.min(), x.max()) == (pytest.approx(480, abs=140), pytest.approx(720, abs=140))
    assert (y.min(), y.max()) == (0, pytest.approx(480, abs=140))  # tiles 0 and 1 are nobody's last hope


def test_a_finer_level_is_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slide_reader, "BLOCK_PX", 256)
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(2411, 1907), tile=1024)
    zero_tile(path, 2, 0)  # all of it
    zero_tile(path, 1, 0)
    with open_slide(path) as reader:
        read, largest = reader.read, 0

        def measured(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
            nonlocal largest
            largest = max(largest, w, h)
            return read(level, x, y, w, h)

        monkeypatch.setattr(reader, "read", measured)
        overview = reader.overview(500)
    assert not overview.unread.any()
    assert 200 < largest <= 257


def test_beyond_the_edge_is_background(slide: Path) -> None:
    with open_slide(slide) as reader:
        inside = reader.read(0, 1000, 700, 13, 87)
        over = reader.read_over(0, 1000, 700, 64, 100)
        assert np.array_equal(over[:87, :13], inside)
        assert (over[87:] == 255).all()
        assert (over[:, 13:] == 255).all()
        assert np.array_equal(reader.read_over(0, 900, 600, 64, 64), reader.read(0, 900, 600, 64, 64))
        reader.background = (10, 20, 30)
        assert reader.read_over(0, 1000, 700, 64, 100)[99, 63].tolist() == [10, 20, 30]
