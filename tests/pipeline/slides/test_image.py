"""Plain images: decoded whole, within a limit, 8 bits a channel."""

from __future__ import annotations

import io
import resource
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms, ImageOps

from pipeline.errors import SlideError
from pipeline.slides.image import ImageReader
from pipeline.slides.open import open_slide
from tests.synth import cut, overwrite, tissue_rgb

RGB = tissue_rgb(1013, 787)


def turned_by(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def test_plain_images(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as reader:
        assert (reader.dimensions, reader.mpp, reader.vendor) == ((1013, 787), None, "png")
        assert np.array_equal(reader.read(0, 7, 11, 13, 17), RGB[11:28, 7:20])


def test_transparent_pixels_of_an_image_are_white(tmp_path: Path) -> None:
    rgba = np.zeros((5, 7, 4), np.uint8)
    rgba[2:, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as reader:
        pixels = reader.read(0, 0, 0, 7, 5)
    assert (pixels[:2] == 255).all()
    assert (pixels[2:] == 0).all()


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_a_process_without_file_descriptors_is_no_fault_of_the_image(tmp_path: Path, name: str) -> None:
    Image.fromarray(RGB).save(tmp_path / name)
    ImageReader(tmp_path / name).close()  # Pillow loads its formats with the first image
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        for opened in (ImageReader, open_slide):
            with pytest.raises(SlideError, match="Too many open files") as caught:
                opened(tmp_path / name)
            assert caught.value.reason == "source"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff"])
def test_an_image_that_is_cut_short_stays_unreadable(tmp_path: Path, name: str) -> None:
    Image.fromarray(RGB).save(tmp_path / name)
    cut(tmp_path / name, 0.6)
    with pytest.raises(SlideError) as caught:
        ImageReader(tmp_path / name)
    assert caught.value.reason in {"unreadable", "not-a-slide"}


def test_damage_that_pillow_meets_with_a_value_error_is_unreadable(tmp_path: Path) -> None:
    """As of the width of a TIFF's tiles, by which nothing can be divided."""
    tifffile.imwrite(tmp_path / "a.tif", RGB, tile=(128, 128), photometric="rgb")
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        at = tiff.pages.first.tags["TileWidth"].valueoffset
    overwrite(tmp_path / "a.tif", at, bytes(2))
    with pytest.raises(SlideError, match=r"a\.tif: the image cannot be decoded: .*; copy it again") as caught:
        ImageReader(tmp_path / "a.tif")
    assert caught.value.reason == "unreadable"


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(RGB).convert(mode).save(sink, format="JPEG", quality=90, **options)
    return sink.getvalue()


@pytest.mark.parametrize("damage", ["a block of zeros", "a block is missing", "half, with an end marker"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_with_damage_that_pillow_pads_is_unreadable(tmp_path: Path, damage: str, mode: str) -> None:
    data = jpeg(mode)
    middle = len(data) // 2
    behind = {
        "a block of zeros": bytes(512) + data[middle + 512 :],
        "a block is missing": data[middle + 512 :],
        "half, with an end marker": b"\xff\xd9",
    }
    (tmp_path / "a.jpg").write_bytes(data[:middle] + behind[damage])
    with pytest.raises(SlideError, match=r"a\.jpg: the image cannot be decoded: .*; copy it again") as caught:
        open_slide(tmp_path / "a.jpg")
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": "4:1:1"}, {"progressive": True}])
def test_sound_jpegs_are_pillows_bit_for_bit(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(mode, **options) + b"what some cameras append")
    with Image.open(tmp_path / "a.jpg") as image, ImageReader(tmp_path / "a.jpg") as reader:
        assert np.array_equal(reader.read(0, 0, 0, 1013, 787), np.asarray(image.convert("RGB")))
        assert reader.vendor == "jpeg"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_is_stored_turned_is_read_upright(tmp_path: Path, name: str, orientation: int) -> None:
    """As each program shows it that follows the orientation; Pillow's own turn is the oracle."""
    Image.fromarray(RGB).save(tmp_path / name, exif=turned_by(orientation))
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert expected.shape[:2] == ((1013, 787) if orientation > 4 else (787, 1013))
    with open_slide(tmp_path / name) as reader:
        assert reader.dimensions == expected.shape[1::-1]
        assert np.array_equal(reader.read(0, 7, 11, 130, 170), expected[11:181, 7:137])


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_damaged_exif_data_say_nothing(tmp_path: Path, name: str) -> None:
    Image.fromarray(RGB).save(
        tmp_path / name, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff\1\x12" if name == "a.jpg" else b"MM"
    )
    with open_slide(tmp_path / name) as reader:
        assert reader.dimensions == (1013, 787)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_is_refused(tmp_path: Path, name: str) -> None:
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / name)
    with pytest.raises(SlideError, match=r"CMYK.*convert the \w+ to RGB") as caught:
        open_slide(tmp_path / name)
    assert caught.value.reason == "pixel-type"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_the_colour_profile_of_an_image_is_told(tmp_path: Path, name: str) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    Image.fromarray(RGB).save(tmp_path / name, icc_profile=srgb.tobytes())
    with open_slide(tmp_path / name) as reader:
        assert reader.profile == "sRGB built-in"
    Image.fromarray(RGB).save(tmp_path / name, icc_profile=srgb.tobytes()[:99])
    with open_slide(tmp_path / name) as reader:
        assert reader.profile == "damaged"
    Image.fromarray(RGB).save(tmp_path / name)
    with open_slide(tmp_path / name) as reader:
        assert reader.profile is None


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(SlideError, match="8 bits") as caught:
        open_slide(tmp_path / "deep.png")
    assert caught.value.reason == "pixel-type"


def test_sixteen_bit_colours_of_a_png_are_refused(tmp_path: Path) -> None:
    """Pillow calls them RGB, and gives their upper bytes."""
    deep = np.random.default_rng(0).integers(0, 4096, (20, 30, 3)).astype(np.uint16)
    (tmp_path / "deep.png").write_bytes(imagecodecs.png_encode(deep))
    with Image.open(tmp_path / "deep.png") as image:
        assert image.mode == "RGB"
    with pytest.raises(SlideError, match=r"deep\.png: 16 bits a channel; convert") as caught:
        open_slide(tmp_path / "deep.png")
    assert caught.value.reason == "pixel-type"


def test_too_large_plain_image_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.slides.image.MAX_IMAGE_PX", 1013 * 787 - 1)
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with pytest.raises(SlideError, match="vips") as caught:
        open_slide(tmp_path / "a.png")
    assert caught.value.reason == "too-large"
