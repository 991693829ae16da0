"""Which channels are red, green and blue, and which are no colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from pipeline.errors import SlideError
from pipeline.formats.channels import check_alone, check_samples, colour_order, find_colours
from pipeline.formats.ome import Channel
from tests.synth import tissue_rgb

RGB = tissue_rgb(131, 97)
RED, GREEN, BLUE = 0xFF0000FF, 0x00FF00FF, 0x0000FFFF


@pytest.mark.parametrize(
    ("channels", "order"),
    [
        ([("Red", None), ("Green", None), ("Blue", None)], (0, 1, 2)),
        ([("b", None), (" R ", None), ("green", None)], (1, 2, 0)),
        ([("", BLUE), ("", GREEN), ("", RED)], (2, 1, 0)),
        ([("Channel:0:0", GREEN), ("Channel:0:1", RED), ("C 2", BLUE)], (1, 0, 2)),
        ([("Red", BLUE), ("Green", BLUE), ("Blue", BLUE)], (0, 1, 2)),  # names are for people
        ([("DAPI", BLUE), ("FITC", GREEN), ("TRITC", RED)], None),
        ([("Red", None), ("Green", None), ("Green", None)], None),
        ([("", RED), ("", GREEN), ("", 0x0000FEFF)], None),
        ([("", None), ("", None), ("", None)], None),
        ([("Red", None), ("Green", None)], None),
        ([("Red", None), ("Green", None), ("Blue", None), ("DAPI", None)], None),
        ([("RGB", None)], None),
        ([], None),
    ],
)
def test_names_and_colours(channels: list[tuple[str, int | None]], order: tuple[int, ...] | None) -> None:
    assert colour_order([Channel(name, 1, colour) for name, colour in channels]) == order


def test_a_channel_of_three_samples_is_no_colour() -> None:
    assert colour_order([Channel(name, 3) for name in ("Red", "Green", "Blue")]) is None


def page(path: Path, pixels: Any, **options: Any) -> tifffile.TiffPage:
    tifffile.imwrite(path, pixels, tile=(64, 64), metadata=None, **options)
    with tifffile.TiffFile(path) as tiff:
        return tiff.pages.first


@pytest.mark.parametrize(
    ("samples", "options", "channels"),
    [
        (3, {"photometric": "rgb"}, None),
        (1, {"photometric": "minisblack"}, None),
        (1, {"photometric": "miniswhite"}, None),
        (4, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, None),
        (4, {"photometric": "rgb", "extrasamples": ["unspecified"]}, 4),
        (5, {"photometric": "rgb", "extrasamples": ["unassalpha", "unspecified"]}, 5),
        (2, {"photometric": "minisblack", "planarconfig": "contig"}, 2),
        (3, {"photometric": "minisblack", "planarconfig": "contig"}, 3),
        (5, {"photometric": "minisblack", "planarconfig": "contig"}, 5),
    ],
)
def test_samples_of_one_directory(tmp_path: Path, samples: int, options: dict[str, Any], channels: int | None) -> None:
    pixels = np.dstack([RGB, RGB])[..., :samples]
    found = page(tmp_path / "a.tif", np.ascontiguousarray(pixels if samples > 1 else pixels[..., 0]), **options)
    if channels is None:
        check_samples("a.tif", found)
        return
    what = (
        "RGB and what it does not call transparency; " if options["photometric"] == "rgb" else "which it does not call"
    )
    with pytest.raises(SlideError, match=f"a.tif: {channels} channels, {what}") as caught:
        check_samples("a.tif", found)
    assert caught.value.reason == "pixel-type"


def test_samples_of_one_directory_that_the_xml_calls_colours(tmp_path: Path) -> None:
    found = page(tmp_path / "a.tif", RGB, photometric="minisblack", planarconfig="contig")
    names = [Channel(name, 1) for name in ("Blue", "Red", "Green")]
    assert find_colours("a.tif", [found], names) == (1, 2, 0)
    with pytest.raises(SlideError, match="3 channels"):
        find_colours("a.tif", [found], [Channel("", 3)])
    told = page(tmp_path / "b.tif", RGB, photometric="rgb")
    assert find_colours("a.tif", [told], names) is None  # the directory says it itself


def test_channels_in_other_files(tmp_path: Path) -> None:
    found = page(tmp_path / "a.tif", RGB[..., 0], photometric="minisblack")
    with pytest.raises(SlideError, match="not all of its three channels are in this file"):
        find_colours("a.tif", [found], [Channel(name, 1) for name in ("Red", "Green", "Blue")])


def test_a_grey_picture_with_levels_is_alone(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for step in (1, 2):
            grey = np.ascontiguousarray(RGB[::step, ::step, 1])
            tiff.write(grey, photometric="minisblack", subfiletype=step - 1, metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif") as read:
        check_alone("a.tif", read)
