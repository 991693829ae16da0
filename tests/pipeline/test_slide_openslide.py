"""OpenSlide: which files it takes, and a slide that vanishes. What it reads: with the other reader, in test_slide."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import openslide
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
    assert caught.value.reason == "source"  # it may come back


def test_a_process_without_file_descriptors_is_no_fault_of_the_slide(slide: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(SlideError, match="Too many open files") as caught:
            OpenSlideReader(slide)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.reason == "source"


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.EIO, "source"), (errno.ESTALE, "source"), (errno.ENOMEM, "source"), (None, "bad-tile")]
)
def test_an_error_of_the_disk_is_no_bad_tile(
    slide: Path, code: int | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test makes a disk fail here: OpenSlide's words are put in its place."""
    text = f"Couldn't read file {slide}: {os.strerror(code)}" if code else "Corrupt JPEG data"

    def failing(*_: object) -> None:
        raise openslide.OpenSlideError(text)

    with OpenSlideReader(slide) as reader:
        expected = reader.read(0, 0, 0, 10, 10)
        monkeypatch.setattr(openslide.OpenSlide, "read_region", failing)
        with pytest.raises(SlideError, match=text) as caught:
            reader.read(0, 0, 0, 10, 10)
        assert (caught.value.reason, isinstance(caught.value, BadTileError)) == (reason, code is None)
        monkeypatch.undo()
        assert (reader.read(0, 0, 0, 10, 10) == expected).all()


def test_which_files_are_slides(slide: Path, tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert is_openslide(slide)
    assert not is_openslide(tmp_path / "a.png")
    assert LIBRARY_VERSION >= "4.0.1"
