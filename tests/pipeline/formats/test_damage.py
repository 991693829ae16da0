"""JPEG 2000, WebP, JPEG XR: what is whole passes, whoever wrote it; a lost end or block does not."""

from __future__ import annotations

import io
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from pipeline.formats.damage import check_jpeg2000, check_jpegxr, check_webp
from tests.synth import tissue_rgb

RGB = np.ascontiguousarray(tissue_rgb(613, 487)[100:356, 100:356])
BLANK = np.full((256, 256, 3), 244, np.uint8)
WRITTEN: dict[str, dict[str, Any]] = {
    "lossless": {},
    "layers": {"irreversible": True, "quality_mode": "rates", "quality_layers": [80, 40, 20, 10, 5]},
    "precincts": {"irreversible": True, "precinct_size": (32, 32), "codeblock_size": (16, 16)},
    "in boxes": {"no_jp2": False},
}


def written(rgb: np.ndarray, **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(rgb).save(sink, "JPEG2000", **{"no_jp2": True, **options})
    return sink.getvalue()


WHOLE = written(RGB)
SIZE = (RGB.shape[1], RGB.shape[0])


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("rgb", [RGB, BLANK], ids=["tissue", "blank"])
def test_sound_data_pass(how: str, rgb: np.ndarray) -> None:
    data = written(rgb, **WRITTEN[how])
    check_jpeg2000(data, SIZE)
    check_jpeg2000(data + bytes(7), SIZE)  # as tiles are filled up


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("how", WRITTEN)
def test_a_lost_end_shows_where_the_decoder_says_nothing(how: str, kept: float) -> None:
    data = written(RGB, **WRITTEN[how])
    start = data[: int(kept * len(data))]
    with pytest.raises(ValueError, match="before its end marker"):
        check_jpeg2000(start + bytes(len(data) - len(start)), SIZE)
    if kept == 0.5:
        assert imagecodecs.jpeg2k_decode(start + bytes(len(data) - len(start))).shape == RGB.shape


@pytest.mark.parametrize("how", ["lossless", "layers", "in boxes"])
def test_a_block_of_zeros_shows(how: str) -> None:
    data = written(RGB, **WRITTEN[how])
    middle = len(data) // 2
    with pytest.raises(ValueError, match="zeros within its data"):
        check_jpeg2000(data[:middle] + bytes(512) + data[middle + 512 :], SIZE)


def test_packets_without_data_are_no_damage() -> None:
    """12 layers of 6 resolutions of 3 components may be 216 of them in a row."""
    data = bytearray(WHOLE)
    at = data.index(b"\xff\x52") + 6
    data[at : at + 2] = (12).to_bytes(2, "big")
    middle = len(data) // 2
    check_jpeg2000(bytes(data[:middle]) + bytes(216) + bytes(data[middle + 216 :]), SIZE)
    with pytest.raises(ValueError, match="over 280 zeros"):
        check_jpeg2000(bytes(data[:middle]) + bytes(281) + bytes(data[middle + 281 :]), SIZE)


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd9", WHOLE[:40] + b"\xff\xd9", WHOLE[40:], b"junk\xff\xd9"])
def test_what_is_no_codestream_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"end marker|within its header|components"):
        check_jpeg2000(data, SIZE)


def test_a_picture_larger_than_the_tile_is_refused_before_the_decoder_makes_room_for_it() -> None:
    at = WHOLE.index(b"\xff\x51") + 6
    huge = WHOLE[:at] + (2**31).to_bytes(4, "big") + (2**31 - 1).to_bytes(4, "big") + WHOLE[at + 8 :]
    with pytest.raises(ValueError, match=r"2147483648 x 2147483647 px, not"):
        check_jpeg2000(huge, SIZE)
    many = WHOLE[: at + 32] + (16384).to_bytes(2, "big") + WHOLE[at + 34 :]
    with pytest.raises(ValueError, match="16384 components"):
        check_jpeg2000(many, SIZE)


PICTURES = {
    "tissue": tissue_rgb(613, 487),
    "blank": np.full((1024, 1024, 3), 244, np.uint8),
    "black": np.zeros((2048, 2048, 3), np.uint8),
    "one speck": np.pad(np.zeros((1, 1, 3), np.uint8), ((700, 323), (300, 723), (0, 0)), constant_values=255),
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("options", [{"level": 90, "lossless": False}, {"level": 40, "lossless": False}, {"level": -1}])
def test_sound_webp_passes(picture: str, options: dict[str, Any]) -> None:
    rgb = PICTURES[picture]
    check_webp(bytes(imagecodecs.webp_encode(rgb, **options)), rgb.shape[0] * rgb.shape[1])


@pytest.mark.parametrize("lossless", [False, True])
def test_a_block_of_webp_that_was_lost_is_seen(*, lossless: bool) -> None:
    data = bytes(imagecodecs.webp_encode(RGB, level=-1 if lossless else 90, lossless=lossless))
    middle = len(data) // 2
    with pytest.raises(ValueError, match="over 72 zeros"):
        check_webp(data[:middle] + bytes(512) + data[middle + 512 :], 256 * 256)
    with pytest.raises(ValueError, match="over 72 zeros"):
        check_webp(data[:middle] + bytes(len(data) - middle), 256 * 256)


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("level", [0.5, 0.9, 1.0])
def test_jpeg_xr_passes_as_long_as_it_has_its_end(picture: str, level: float) -> None:
    data = bytes(imagecodecs.jpegxr_encode(PICTURES[picture], level=level))
    check_jpegxr(data)
    check_jpegxr(data + bytes(7))
    for length in (6, 20, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="it ends"):
            check_jpegxr(data[:length])


def test_a_page_of_jpeg_xr_that_was_lost_is_seen() -> None:
    data = bytes(imagecodecs.jpegxr_encode(RGB, level=0.9))
    middle = len(data) // 2
    with pytest.raises(ValueError, match="4096 zeros"):
        check_jpegxr(data[:middle] + bytes(4096) + data[middle + 4096 :])
