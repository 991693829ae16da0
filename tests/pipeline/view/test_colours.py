from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.view.colours import Scale, coloured, shaded

RISING = Scale("rising", 20.0, "x uniform", "the same for all slides")
SIGNED = Scale("signed", 1.5, "log odds", "the same for all slides")


def _rgba(data: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


def _times(number: str) -> str:
    return f"{number}\N{MULTIPLICATION SIGN}"


def test_attention_is_clear_where_it_is_uniform_and_denser_above() -> None:
    pixels = _rgba(
        coloured(RISING, np.array([[0.2, 1.0, 2.0, 20.0, 900.0, 5.0]]), np.array([[1, 1, 1, 1, 1, 0]], bool))
    )
    assert pixels[0, :, 3].tolist()[:2] == [0, 0]
    assert 0 < pixels[0, 2, 3] < pixels[0, 3, 3] < 255  # the tissue is seen through the densest
    np.testing.assert_array_equal(pixels[0, 3], pixels[0, 4])
    assert pixels[0, 5, 3] == 0  # no patch there


def test_signs_have_colours_and_zero_is_clear() -> None:
    pixels = _rgba(coloured(SIGNED, np.array([[-9.0, -1.5, 0.0, 1.5]]), np.ones((1, 4), bool)))
    assert pixels[0, 2, 3] == 0
    np.testing.assert_array_equal(pixels[0, 0], pixels[0, 1])
    assert pixels[0, 0, 2] > pixels[0, 0, 0]  # blue below
    assert pixels[0, 3, 0] > pixels[0, 3, 2]  # vermilion above


def test_the_colour_bar_is_of_the_colours_of_the_tiles() -> None:
    for scale in (RISING, SIGNED):
        legend = scale.legend()
        assert len(legend["colours"]) == 17
        red, green, blue, alpha = scale.palette[255].tolist()
        assert legend["colours"][-1] == f"rgba({red}, {green}, {blue}, {alpha / 255:.2f})"
        assert [mark["at"] for mark in legend["marks"]] == sorted(mark["at"] for mark in legend["marks"])
    assert [mark["text"] for mark in RISING.legend()["marks"]] == [_times(v) for v in ("1", "2", "5", "10", "20")]
    assert [mark["text"] for mark in SIGNED.legend()["marks"]][::2] == ["-1.5", "+0", "+1.5"]
    times = Scale("signed", 3.0, "", "", times=True).legend()["marks"]
    assert [mark["text"] for mark in times] == [_times(v) for v in ("8", "2.8", "1", "2.8", "8")]


def test_rising_colours_are_told_apart_by_brightness_alone() -> None:
    """As by somebody who sees no hue at all: over white, each step of the bar is of another luminance, in order."""
    palette = RISING.palette[2:].astype(float)
    luminance = palette[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance[:: len(luminance) // 16]) > 0).all()


def test_what_is_not_meant_is_dark_glass() -> None:
    pixels = _rgba(shaded(np.array([[True, False]])))
    assert pixels[0, 1, 3] == 0
    assert 0 < pixels[0, 0, 3] < 255
