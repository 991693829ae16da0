"""JPEG segments: a file of its own decodes to the same pixels, and damage that is plain to see is seen."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from pipeline.formats import jpeg
from tests.synth import split_tables, tissue_rgb

RGB = np.ascontiguousarray(tissue_rgb(211, 157)[:112, :80])
WHOLE = simplejpeg.encode_jpeg(RGB, quality=85, colorsubsampling="420")
TILE, TABLES = split_tables(WHOLE)
RGB_WHOLE = bytes(imagecodecs.jpeg8_encode(RGB, level=85, colorspace="rgb", outcolorspace="rgb", subsampling="444"))
RGB_TILE, RGB_TABLES = split_tables(RGB_WHOLE)
JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
ADOBE = {colours: b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0" + bytes([colours]) for colours in (0, 1)}


def test_header() -> None:
    found = jpeg.header(WHOLE)
    assert (found.width, found.height, found.components) == (80, 112, b"\1\2\3")
    assert found.sequential
    assert found.colours == "YCbCr"
    assert jpeg.header(TILE).colours is None
    assert jpeg.header(RGB_WHOLE).colours == "RGB"
    assert WHOLE[: found.scan].count(b"\xff\xda") == 1


def test_a_tile_with_its_tables_is_the_whole_again() -> None:
    made = jpeg.standalone(TILE, jpeg.tables_segments(TABLES), rgb=False)
    assert np.array_equal(simplejpeg.decode_jpeg(made), simplejpeg.decode_jpeg(WHOLE))
    assert made.endswith(TILE[jpeg.header(TILE).scan :])  # the compressed data are untouched


def test_an_rgb_tile_names_its_colours() -> None:
    made = jpeg.standalone(RGB_TILE, jpeg.tables_segments(RGB_TABLES), rgb=True)
    assert made[2:4] == b"\xff\xee"
    assert jpeg.header(made).colours == "RGB"
    assert np.abs(simplejpeg.decode_jpeg(made).astype(int) - RGB).mean() < 5
    assert np.array_equal(simplejpeg.decode_jpeg(made), imagecodecs.jpeg8_decode(RGB_WHOLE))


@pytest.mark.parametrize("rgb", [False, True])
@pytest.mark.parametrize(
    "whole", [WHOLE, RGB_WHOLE, WHOLE.replace(JFIF, ADOBE[1])], ids=["JFIF", "components R, G, B", "Adobe"]
)
def test_what_a_tile_says_of_its_colours_holds_whatever_the_directory_says(whole: bytes, *, rgb: bool) -> None:
    assert jpeg.standalone(whole, b"", rgb) == whole
    assert np.abs(simplejpeg.decode_jpeg(whole).astype(int) - RGB).mean() < 9


def test_jfif_rules_where_adobe_contradicts_it() -> None:
    for named in (JFIF + ADOBE[0], ADOBE[0] + JFIF):
        assert jpeg.header(WHOLE.replace(JFIF, named)).colours == "YCbCr"
    assert jpeg.header(WHOLE.replace(JFIF, ADOBE[0])).colours == "RGB"


def test_what_needs_nothing_stays_as_it_is_but_for_bytes_behind_its_end() -> None:
    assert jpeg.standalone(WHOLE, b"", rgb=False) == WHOLE
    assert jpeg.standalone(WHOLE + b"\0" * 7, b"", rgb=False) == WHOLE
    assert jpeg.standalone(WHOLE + TILE[:50], b"", rgb=False) == WHOLE


def test_tables_need_neither_start_nor_end() -> None:
    assert jpeg.tables_segments(TABLES) == TABLES[2:-2]
    assert jpeg.tables_segments(TABLES[2:-2]) == TABLES[2:-2]
    assert jpeg.tables_segments(None) == b""


@pytest.mark.parametrize("named", [JFIF, ADOBE[0], ADOBE[1], JFIF + ADOBE[0]])
@pytest.mark.parametrize("rgb", [False, True])
def test_tables_do_not_name_the_colours(named: bytes, *, rgb: bool) -> None:
    tile, tables, whole = (RGB_TILE, RGB_TABLES, RGB_WHOLE) if rgb else (TILE, TABLES, WHOLE)
    segments = jpeg.tables_segments(tables[:2] + named + tables[2:])
    assert segments == jpeg.tables_segments(tables)
    made = simplejpeg.decode_jpeg(jpeg.standalone(tile, segments, rgb))
    assert np.array_equal(made, imagecodecs.jpeg8_decode(whole))


@pytest.mark.parametrize("broken", [bytes(20), TABLES[2:40], TABLES[2:-2] + b"\xff", b"\xff\xdb", b"\xff\xdb\0\0\xff"])
def test_broken_tables_stay_what_they_are(broken: bytes) -> None:
    assert jpeg.tables_segments(broken) == broken


def doubtful(data: bytes) -> bool:
    return jpeg.is_doubtful(data, jpeg.header(WHOLE))


def test_sound_data_are_not_doubtful() -> None:
    assert not doubtful(WHOLE)
    assert not doubtful(WHOLE + b"\0")


@pytest.mark.parametrize("restarts", [0, 3])
def test_restart_markers_belong_to_sound_data(restarts: int) -> None:
    scan = jpeg.header(WHOLE).scan
    with_restarts = WHOLE[: scan + 9] + b"\xff\xd0\xff\xd7" * restarts + WHOLE[scan + 9 :]
    assert not doubtful(with_restarts)


@pytest.mark.parametrize("damage", ["cut short", "zeros within", "other data within", "a marker within"])
def test_damage_that_is_plain_to_see(damage: str) -> None:
    middle = (jpeg.header(WHOLE).scan + len(WHOLE)) // 2
    other = {
        "cut short": WHOLE[:middle],
        "zeros within": WHOLE[:middle] + bytes(100) + WHOLE[middle + 100 :],
        "other data within": WHOLE[:middle] + np.random.default_rng(0).bytes(1000) + WHOLE[-2:],
        "a marker within": WHOLE[:middle] + b"\xff\xc4" + WHOLE[middle + 2 :],
    }
    assert doubtful(other[damage])


@given(st.integers(0, jpeg.header(WHOLE).scan), st.binary(max_size=6))
def test_a_broken_header_is_a_value_error_or_another_header(place: int, data: bytes) -> None:
    broken = WHOLE[:place] + data + WHOLE[place + len(data) :]
    try:
        found = jpeg.header(broken)
    except ValueError:
        return
    assert 0 < found.scan <= len(broken) + 2**16


@pytest.mark.parametrize("length", [0, 1, 2, 3, 20, 200, 600])
def test_a_cut_header(length: int) -> None:
    with pytest.raises(ValueError, match="it "):
        jpeg.header(WHOLE[:length])
