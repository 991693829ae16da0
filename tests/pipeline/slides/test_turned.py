"""A slide that is stored turned reads as its upright twin, at every level and place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from pipeline.errors import BadTileError
from pipeline.slides.open import open_slide
from pipeline.slides.reader import SlideReader
from pipeline.slides.turned import orientation, upright, upright_size
from tests.synth import tissue_rgb, zero_tile

STORED = tissue_rgb(613, 487)
ORIENTATIONS = range(1, 9)


def shown(pixels: np.ndarray, stored: int) -> np.ndarray:
    """What Pillow makes of it."""
    image = Image.fromarray(pixels)
    image.getexif()[ExifTags.Base.Orientation] = stored
    return np.asarray(ImageOps.exif_transpose(image))


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    options: dict[str, Any] = {"tile": (64, 80), "photometric": "rgb", "compression": "zlib", "metadata": None}
    for stored in ORIENTATIONS:
        with tifffile.TiffWriter(folder / f"{stored}.tif") as tiff:
            tag = [(274, 3, 1, stored, True)]
            tiff.write(STORED, resolution=(20_000, 20_100), resolutionunit=3, extratags=tag, **options)
            tiff.write(STORED[::2, ::2].copy(), subfiletype=1, **options)
    return folder


@pytest.mark.parametrize("stored", ORIENTATIONS)
def test_levels_and_microns_are_the_upright_ones(slides: Path, stored: int) -> None:
    with open_slide(slides / f"{stored}.tif") as reader:
        sizes = [(level.width, level.height) for level in reader.levels]
        assert sizes == [size[:: -1 if stored > 4 else 1] for size in ((613, 487), (307, 244))]
        assert reader.dimensions == upright_size((613, 487), stored) == sizes[0]
        assert reader.bounds == (0, 0, *sizes[0])
        assert reader.mpp == pytest.approx((0.5, 1e4 / 20_100)[:: -1 if stored > 4 else 1])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), stored=st.sampled_from(ORIENTATIONS))
def test_any_box_is_the_cut_out_of_the_upright_level(slides: Path, data: st.DataObject, stored: int) -> None:
    number = data.draw(st.integers(0, 1))
    whole = shown(STORED[:: number + 1, :: number + 1], stored)
    height, width = whole.shape[:2]
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    w, h = data.draw(st.integers(1, width - x)), data.draw(st.integers(1, height - y))
    with open_slide(slides / f"{stored}.tif") as reader:
        reader.expect(number, np.array([[x, y, w, h]]))
        assert np.array_equal(reader.read(number, x, y, w, h), whole[y : y + h, x : x + w])


@pytest.mark.parametrize("stored", ORIENTATIONS)
def test_the_overview_is_upright(slides: Path, stored: int) -> None:
    whole = shown(STORED, stored)
    with open_slide(slides / f"{stored}.tif") as reader:
        found = reader.overview(128).rgb
    expected = Image.fromarray(whole).resize(found.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(found.astype(int) - np.asarray(expected)).mean() < 4


def native(reader: SlideReader) -> bool:
    return reader.native_tiles(0) is not None


def test_tiles_as_they_are_stored_are_not_handed_out(slides: Path) -> None:
    with open_slide(slides / "1.tif") as as_it_is, open_slide(slides / "2.tif") as turned:
        assert native(as_it_is)
        assert not native(turned)


def test_a_bad_tile_costs_its_upright_place(slides: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes((slides / "6.tif").read_bytes())
    zero_tile(path, 0, 0)  # upper left as it is stored, 80 x 64 px: upper right upright, 64 x 80 px
    with open_slide(path) as reader:
        assert reader.dimensions == (487, 613)
        with pytest.raises(BadTileError):
            reader.read(0, 487 - 64, 79, 1, 1)
        assert reader.read(0, 487 - 65, 0, 1, 100).shape == (100, 1, 3)
        assert reader.read(0, 487 - 64, 80, 64, 1).shape == (1, 64, 3)


@pytest.mark.parametrize("stored", ORIENTATIONS)
def test_a_mask_is_turned_as_a_picture_is(stored: int) -> None:
    grey = STORED[..., 1]
    assert np.array_equal(upright(grey, stored), shown(grey, stored))
    assert np.array_equal(upright(STORED, stored), shown(STORED, stored))


@pytest.mark.parametrize(("stated", "found"), [(6, 6), (0, 1), (9, 1), (None, 1)])
def test_what_an_image_says(tmp_path: Path, stated: Any, found: int) -> None:
    exif = Image.Exif()
    if stated is not None:
        exif[ExifTags.Base.Orientation] = stated
    Image.fromarray(STORED).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert orientation(image) == found
