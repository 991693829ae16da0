from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from pipeline.demo.tiff import TILE, write_pyramid
from pipeline.slides.open import open_slide


def _ramp(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Smooth, another in each channel, so that JPEG keeps it and no mirroring or swap goes unseen."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (x * 255 // width, y * 255 // height, (x + 2 * y) * 255 // (width + 2 * height), np.zeros_like(x))
    return np.stack(planes, axis=2).astype(np.uint8)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    path = tmp_path / "ramp.tif"
    write_pyramid(path, _ramp(1723, 1009), mpp=0.25)
    return path


def test_openslide_reads_every_level(slide: Path) -> None:
    image = _ramp(1723, 1009)[..., :3].astype(np.int16)
    with open_slide(slide) as reader:
        assert (reader.vendor, reader.mpp) == ("generic-tiff", (0.25, 0.25))
        assert [(level.width, level.height) for level in reader.levels] == [(1723, 1009), (861, 504), (430, 252)]
        for number, level in enumerate(reader.levels):
            pixels = reader.read(number, 0, 0, level.width, level.height).astype(np.int16)
            expected = image[:: 2**number, :: 2**number][: level.height, : level.width]
            assert np.abs(pixels - expected).max() <= 8
            assert np.abs(pixels - expected).mean() <= 2


def test_the_tags_of_each_level(slide: Path) -> None:
    with tifffile.TiffFile(slide) as tiff:
        assert [page.is_reduced for page in tiff.pages] == [False, True, True]
        for number, page in enumerate(tiff.pages):
            assert isinstance(page, tifffile.TiffPage)
            assert (page.tilewidth, page.tilelength, page.compression.name) == (TILE, TILE, "JPEG")
            assert page.get_resolution("MICROMETER")[0] == pytest.approx(1 / (0.25 * 2**number))


def test_equal_pictures_give_equal_bytes(slide: Path, tmp_path: Path) -> None:
    write_pyramid(tmp_path / "again.tif", _ramp(1723, 1009), mpp=0.25)
    assert slide.read_bytes() == (tmp_path / "again.tif").read_bytes()


def test_a_picture_of_two_tiles_has_one_level(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "small.tif", _ramp(2 * TILE, 97), mpp=0.5)
    with tifffile.TiffFile(tmp_path / "small.tif") as tiff:
        assert len(tiff.pages) == 1
        assert tiff.pages[0].shape == (97, 2 * TILE, 3)
