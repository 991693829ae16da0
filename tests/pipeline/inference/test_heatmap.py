from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.inference.figures import typeface
from pipeline.inference.heatmap import Heatmap, attention_map, highest, overlay_box, overlay_png, round_length, wrapped


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_the_map_paints_patches_where_they_lie_and_averages_overlaps() -> None:
    x, y = np.array([0, 20, 30]), np.array([10, 0, 0])
    field = attention_map((6, 7), 10.0, x, y, 20.0, np.array([1.0, 2.0, 4.0]))
    expected = [
        [0, 0, 2, 3, 4, 0, 0],
        [1, 1, 2, 3, 4, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(field, expected)


def test_patches_smaller_than_a_pixel_still_show() -> None:
    field = attention_map((3, 4), 100.0, np.array([250]), np.array([130]), 5.0, np.array([7.0]))
    assert field[1, 2] == 7.0
    assert np.count_nonzero(field) == 1


def _slide(attention: list[float], mpp: float | None = 0.5) -> Heatmap:
    thumbnail = np.full((157, 211, 3), 200, np.uint8)
    x, y = np.array([0, 96]), np.array([0, 64])
    return Heatmap(thumbnail, 1.0, x, y, 32.0, np.array(attention, np.float32), mpp)


ZOOM, PAD = 900 / 211, 14
PLACES = {name: (int(PAD + cy * ZOOM), int(PAD + cx * ZOOM)) for name, cx, cy in (("cold", 16, 16), ("hot", 112, 80))}


def test_the_overlay_colours_attended_patches_only() -> None:
    plain, hot = (_pixels(overlay_png(_slide(values), 2.0)) for values in ([0.5, 0.5], [0.1, 0.9]))
    assert hot.shape == plain.shape
    assert len(set(hot[PLACES["cold"]].tolist())) == 1  # grey
    assert len(set(hot[PLACES["hot"]].tolist())) == 3
    assert len(set(plain[PLACES["hot"]].tolist())) == 1


def test_one_scale_gives_one_attention_one_colour_on_every_slide() -> None:
    """0.6 of two patches is 1.2 times uniform; so is 0.4 of three, beside a patch of much more."""
    two = _slide([0.4, 0.6])
    three = Heatmap(
        two.thumbnail, 1.0, np.array([0, 96, 150]), np.array([0, 64, 0]), 32.0, np.array([0.1, 0.4, 0.5]), 0.5
    )
    top = highest([two.attention, three.attention])
    assert top == 1.5
    shown = [_pixels(overlay_png(slide, top))[PLACES["hot"]].tolist() for slide in (two, three)]
    assert shown[0] == shown[1]
    own = _pixels(overlay_png(two, 100.0))[PLACES["hot"]].tolist()
    assert own != shown[0]
    assert highest([]) == 1.0


def test_marks_stand_in_the_margin_and_leave_the_patch_visible() -> None:
    plain, marked = (_pixels(overlay_png(_slide([0.1, 0.9]), 2.0, marks=marks)) for marks in ((), (1,)))
    margin = marked.shape[1] - plain.shape[1]
    assert margin > 0
    inner = np.s_[PAD + int(66 * ZOOM) : PAD + int(94 * ZOOM), PAD + int(98 * ZOOM) : PAD + int(126 * ZOOM)]
    np.testing.assert_array_equal(marked[:, margin:][inner], plain[inner])
    assert (marked[:, margin:][: PAD + 700] != plain[: PAD + 700]).any()  # the frame and its line
    assert (marked[:, :margin] != 255).any()  # the number


def test_the_scale_bar_is_as_long_as_it_says() -> None:
    """211 px of 0.5 um: 105 um wide, so a bar of 20 um: 40 px of the slide."""
    for mpp, length in ((0.5, 40), (None, 50)):
        below = _pixels(overlay_png(_slide([0.5, 0.5], mpp), 2.0))[int(PAD + 157 * ZOOM) :]
        assert abs(_longest(below.sum(axis=2) < 250) - length * ZOOM) < 3


@given(
    st.integers(1, 1000),
    st.sampled_from(["tall", "wide"]),
    st.sampled_from([None, 0.25, 1e5]),
    st.sampled_from([60, 900]),
)
def test_slides_of_any_shape_have_a_picture(ratio: int, way: str, mpp: float | None, map_px: int) -> None:
    """Up to 1:1000, of which a thumbnail has one px across."""
    across = max(1, round(512 / ratio))
    shape = (512, across) if way == "tall" else (across, 512)
    dimensions = (51_200 // ratio, 51_200) if way == "tall" else (51_200, 51_200 // ratio)
    slide = Heatmap(
        np.full((*shape, 3), 200, np.uint8), 100.0, np.array([0]), np.array([0]), 32.0, np.array([1.0]), mpp, dimensions
    )
    picture = _pixels(overlay_png(slide, 10.0, caption=["a"], marks=(0,), map_px=map_px))
    assert picture.shape[0] > max(200, overlay_box(shape, map_px=map_px).height)


def _longest(dark: np.ndarray) -> int:
    """Px of the longest run of dark px in any row."""
    runs = ["".join("x" if px else " " for px in row).split() for row in dark]
    return max(len(run) for row in runs for run in row)


def test_lengths_are_round() -> None:
    assert [round_length(value) for value in (1.0, 1.9, 2.0, 49.9, 7.3e3, 0.3)] == [1, 1, 2, 20, 5000, 0.2]


def test_captions_stand_below_and_equal_inputs_give_equal_bytes() -> None:
    plain, first = overlay_png(_slide([0.4, 0.6]), 2.0), overlay_png(_slide([0.4, 0.6]), 2.0, caption=["a $x_1$", "b"])
    assert first == overlay_png(_slide([0.4, 0.6]), 2.0, caption=["a $x_1$", "b"])
    more = _pixels(first).shape[0] - _pixels(plain).shape[0]
    assert more == 32
    assert (_pixels(first)[-more:] < 128).any()


@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "Zs"]), max_size=60), max_size=3))
def test_captions_are_broken_where_they_are_too_wide(caption: list[str]) -> None:
    lines = wrapped(caption, 90.0)
    assert all(typeface(14.5).getlength(line) <= 90 for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(caption).replace(" ", "")
    assert wrapped(caption, 1e6) == caption


def test_the_rest_of_a_word_that_was_cut_shares_its_line_with_the_next_word() -> None:
    lines = wrapped(["m" * 20 + " a b"], 90.0)
    assert lines[-1] == "mm a b"
    assert "".join(lines) == "m" * 20 + " a b"
    small = wrapped(["m" * 20], 90.0, 7.25)
    assert len(small) < len(lines)
    assert all(typeface(7.25).getlength(line) <= 90 for line in small)


def test_a_long_caption_is_whole_below_a_narrow_slide() -> None:
    slide = Heatmap(np.full((512, 8, 3), 220, np.uint8), 1.0, np.array([0]), np.array([0]), 8.0, np.array([1.0]), None)
    plain, told = (_pixels(overlay_png(slide, 2.0, caption=caption)) for caption in (["a"], ["word " * 60]))
    assert told.shape[0] > plain.shape[0] + 16
    assert told.shape[1] == plain.shape[1] == 480
    assert (told[:, -14:] == 255).all()


@pytest.mark.parametrize("high", [2.0, 9.0, 120.0, 5e3, 1e6])
def test_lettering_of_the_scale_does_not_overlap_beside_a_flat_slide(high: float) -> None:
    slide = Heatmap(
        np.full((40, 500, 3), 220, np.uint8), 1.0, np.array([0]), np.array([0]), 32.0, np.array([1.0]), None
    )
    pixels = _pixels(overlay_png(slide, high, map_px=560))
    right = pixels[71:, 14 + 560 + 14 + 18 + 8 :].min(axis=2) < 128
    begins = np.flatnonzero(np.diff(np.append(False, right.any(axis=1)).astype(int)) == 1)
    assert len(begins) >= 2
    assert (np.diff(begins) > 15).all()


def test_many_marks_of_one_place_keep_their_numbers_apart() -> None:
    n = 6
    thumbnail, x, y = np.full((157, 211, 3), 220, np.uint8), np.full(n, 90), np.full(n, 120)
    slide = Heatmap(thumbnail, 1.0, x, y, 32.0, np.full(n, 1 / n), None)
    pixels = _pixels(overlay_png(slide, 2.0, marks=range(n)))
    ink = (pixels[: PAD + int(157 * ZOOM), PAD : PAD + 18].min(axis=2) < 200).any(axis=1)
    begins = np.flatnonzero(np.diff(np.append(False, ink).astype(int)) == 1)
    assert len(begins) == n  # white between all of them


def test_the_title_of_the_scale_fits_beside_a_flat_slide() -> None:
    thumbnail = np.full((40, 500, 3), 220, np.uint8)
    slide = Heatmap(thumbnail, 1.0, np.array([0]), np.array([0]), 32.0, np.array([1.0]), None)
    pixels = _pixels(overlay_png(slide, 2.0, map_px=560))
    assert (pixels[:3] == 255).all()  # nothing is cut off at the top
    assert (pixels[:60, -110:] < 128).any()  # where the title is
