"""JPEG 2000: what is whole passes, whoever wrote it; a lost end or block does not."""

from __future__ import annotations

import io
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from pipeline.slides import jpeg2000
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


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("rgb", [RGB, BLANK], ids=["tissue", "blank"])
def test_sound_data_pass(how: str, rgb: np.ndarray) -> None:
    data = written(rgb, **WRITTEN[how])
    jpeg2000.check(data)
    jpeg2000.check(data + bytes(7))  # as tiles are filled up


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("how", WRITTEN)
def test_a_lost_end_shows_where_the_decoder_says_nothing(how: str, kept: float) -> None:
    data = written(RGB, **WRITTEN[how])
    start = data[: int(kept * len(data))]
    with pytest.raises(ValueError, match="before its end marker"):
        jpeg2000.check(start + bytes(len(data) - len(start)))
    if kept == 0.5:
        assert imagecodecs.jpeg2k_decode(start + bytes(len(data) - len(start))).shape == RGB.shape


@pytest.mark.parametrize("how", ["lossless", "layers", "in boxes"])
def test_a_block_of_zeros_shows(how: str) -> None:
    data = written(RGB, **WRITTEN[how])
    middle = len(data) // 2
    with pytest.raises(ValueError, match="zeros within its data"):
        jpeg2000.check(data[:middle] + bytes(512) + data[middle + 512 :])


def test_packets_without_data_are_no_damage() -> None:
    """12 layers of 6 resolutions of 3 components may be 216 of them in a row."""
    data = bytearray(WHOLE)
    at = data.index(b"\xff\x52") + 6
    data[at : at + 2] = (12).to_bytes(2, "big")
    middle = len(data) // 2
    jpeg2000.check(bytes(data[:middle]) + bytes(216) + bytes(data[middle + 216 :]))
    with pytest.raises(ValueError, match="over 280 zeros"):
        jpeg2000.check(bytes(data[:middle]) + bytes(281) + bytes(data[middle + 281 :]))


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd9", WHOLE[:40] + b"\xff\xd9", WHOLE[40:], b"junk\xff\xd9"])
def test_what_is_no_codestream_is_a_value_error_or_left_to_the_decoder(data: bytes) -> None:
    if data.rfind(b"\xff\xd9") < 0:
        with pytest.raises(ValueError, match="end marker"):
            jpeg2000.check(data)
    else:
        jpeg2000.check(data)
