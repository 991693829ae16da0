"""OpenSlide: which files it takes, and a slide that vanishes. What it reads: with the other reader, in test_slide."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import BadTileError, SlideError
from pipeline.slide_openslide import LIBRARY_VERSION, OpenSlideReader, is_openslide
from tests.synth import tissue_rgb, write_pyramid, zero_tile

RGB = tissue_rgb(1013, 787)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "Schnitt 1 ä.tiff", RGB)


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
