"""OpenSlide: its pixels, and a handle that is opened anew after an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.errors import BadTileError, SlideError
from pipeline.slide_openslide import LIBRARY_VERSION, OpenSlideReader, is_openslide
from tests.synth import overwrite, tile_span, tissue_rgb, write_pyramid, zero_tile

RGB = tissue_rgb(1013, 787)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "Schnitt 1 ä.tiff", RGB)


def test_level0_pixels_are_those_of_the_tiles(slide: Path) -> None:
    offset, length = tile_span(slide, 0, 1)  # tile row 0, column 1
    tile = simplejpeg.decode_jpeg(slide.read_bytes()[offset : offset + length])
    with OpenSlideReader(slide) as reader:
        got = reader.read(0, 240, 0, 240, 240)
    assert got.dtype == np.uint8
    assert np.array_equal(got, tile)


def test_boxes_are_placed_in_the_px_of_their_level(slide: Path) -> None:
    with OpenSlideReader(slide) as reader:
        at1, at0 = reader.read(1, 101, 67, 53, 31), reader.read(0, 202, 134, 106, 62)
    halved = np.asarray(Image.fromarray(at0).resize((53, 31), Image.Resampling.BOX))
    assert at1.shape == (31, 53, 3)
    assert np.abs(at1.astype(int) - halved).mean() < 6
    assert np.abs(at1.astype(int) - halved[::-1]).mean() > 6


@pytest.mark.parametrize("spoil", ["zeroed", "bits flipped", "cut short"])
def test_a_bad_tile_costs_only_the_reads_that_touch_it(slide: Path, spoil: str) -> None:
    with OpenSlideReader(slide) as reader:
        neighbour = reader.read(0, 480, 0, 240, 240)
    offset, length = tile_span(slide, 0, 1)
    data = slide.read_bytes()[offset : offset + length]
    spoilt = {
        "zeroed": bytes(length),
        "bits flipped": bytes(b ^ 255 for b in data),
        "cut short": data[:20] + bytes(length - 20),
    }
    overwrite(slide, offset, spoilt[spoil])
    with OpenSlideReader(slide) as reader:
        for _ in range(2):
            with pytest.raises(BadTileError, match=r"level 0, x 230, y 0") as caught:
                reader.read(0, 230, 0, 20, 20)
            assert caught.value.reason == "bad-tile"
            assert np.array_equal(reader.read(0, 480, 0, 240, 240), neighbour)


def test_a_slide_that_vanishes_while_read_is_a_slide_error(slide: Path) -> None:
    zero_tile(slide, 0, 0)
    with OpenSlideReader(slide) as reader:
        slide.unlink()
        with pytest.raises(SlideError) as caught:
            reader.read(0, 0, 0, 10, 10)
    assert not isinstance(caught.value, BadTileError)
    assert caught.value.reason == "unopenable"


def test_which_files_are_slides(slide: Path, tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert is_openslide(slide)
    assert not is_openslide(tmp_path / "a.png")
    assert LIBRARY_VERSION >= "4.0.1"
