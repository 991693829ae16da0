"""Which pages of a TIFF are levels, how large they are, and how many microns a px has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import SlideError
from pipeline.slides.layout import Layout, read_layout
from pipeline.slides.openslide import OpenSlideReader
from pipeline.storage.ranges import LocalSource
from tests.synth import cut, leica_xml, overwrite, philips_xml, tissue_rgb, write_pyramid

RGB = tissue_rgb(313, 271)
APERIO = "Aperio Image Library v10.0\r\n313x271|AppMag = 20|MPP = {}|Left = 3"


def layout(path: Path) -> Layout | None:
    source = LocalSource(path)
    try:
        found = read_layout(source)
        return found if isinstance(found, Layout) else None
    finally:
        source.close()


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tables_of_every_kind_of_tiff(tmp_path: Path, order: str, *, big: bool) -> None:
    path = tmp_path / "a.tif"
    options: dict[str, Any] = {"tile": (64, 64), "compression": "jpeg", "photometric": "rgb"}
    tifffile.imwrite(path, RGB, byteorder=order, bigtiff=big, resolution=(20_000, 20_000), resolutionunit=3, **options)
    found = layout(path)
    assert found is not None
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        assert found.pages[0].offsets.tolist() == list(page.dataoffsets)
        assert found.pages[0].lengths.tolist() == list(page.databytecounts)
    assert found.mpp == (0.5, 0.5)
    assert (found.pages[0].tiles.columns, found.pages[0].tiles.rows) == (5, 5)


def test_one_tile_whose_table_stands_in_the_directory(tmp_path: Path) -> None:
    found = layout(write_pyramid(tmp_path / "a.tiff", RGB[:60, :50], levels=1, tile=64))
    assert found is not None
    assert found.pages[0].offsets.shape == found.pages[0].lengths.shape == (1,)
    assert found.pages[0].offsets[0] == 8


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mpp=st.one_of(st.none(), st.floats(0.25, 20)), kind=st.sampled_from(["generic", "aperio"]))
def test_levels_and_microns_are_openslides(tmp_path: Path, mpp: float | None, kind: str) -> None:
    description = APERIO.format(mpp) if kind == "aperio" and mpp is not None else None
    path = write_pyramid(tmp_path / "a.tiff", RGB, tile=64, mpp=mpp, description=description)
    found = layout(path)
    assert found is not None
    with OpenSlideReader(path) as theirs:
        assert found.levels == theirs.levels
        assert found.vendor == theirs.vendor
        assert (found.mpp is None) == (theirs.mpp is None)
        assert (found.mpp or ()) == pytest.approx(theirs.mpp or (), rel=1e-9)


def test_philips_levels_are_cut_to_their_true_size(tmp_path: Path) -> None:
    xml = philips_xml(3, 0.25)
    path = write_pyramid(tmp_path / "a.tiff", RGB, tile=64, software="Philips DP v1.0", description=xml)
    found = layout(path)
    assert found is not None
    assert [(level.width, level.height, level.downsample) for level in found.levels] == [
        (313, 271, 1.0),
        (156, 135, 2.0),
        (78, 67, 4.0),
    ]
    assert found.mpp == pytest.approx((0.25, 0.25))


def test_philips_levels_in_another_order_beside_a_tiled_macro(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tile": (64, 64), "compression": "jpeg", "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(tmp_path / "a.tiff") as tiff:
        for step, text in ((2, philips_xml(3, 0.25)), (1, None), (4, None)):
            rgb = np.ascontiguousarray(RGB[::step, ::step])
            tiff.write(rgb, description=text, software="Philips DP v1.0", **options)
        tiff.write(RGB[100:160, :200], description="Macro", software="Philips DP v1.0", **options)
    found = layout(tmp_path / "a.tiff")
    assert found is not None
    assert [(level.width, level.height) for level in found.levels] == [(313, 271), (156, 135), (78, 67)]
    assert [page.tiles.columns for page in found.pages] == [5, 3, 2]
    assert (found.vendor, found.picked.of) == ("philips", 2)
    assert found.mpp == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize("xml", [philips_xml(2, 0.25), philips_xml(3, 0.25).replace(">WSI<", ">LABELIMAGE<")])
def test_a_philips_slide_that_contradicts_itself_is_left_to_openslide(tmp_path: Path, xml: str) -> None:
    path = write_pyramid(tmp_path / "a.tiff", RGB, tile=64, software="Philips DP v1.0", description=xml)
    assert layout(path) is None


@pytest.mark.parametrize(
    "tags",
    [
        {"more": [(65420, "I", (1,)), (271, "s", tuple(b"Hamamatsu\0"))]},
        {"more": [(700, "B", tuple(b"<iScan/>\0"))], "software": "ScanOutputManager 1.1.0.15854"},
        {"description": leica_xml([(313, 271), (156, 135)], (400, 300), (13, 7), 0.5)},
        {"software": "MedScan 1.1.7"},
    ],
    ids=["Hamamatsu NDPI", "Ventana BIF", "Leica SCN", "Trestle"],
)
def test_what_only_openslide_reads_rightly_is_left_to_it(tmp_path: Path, tags: dict[str, Any]) -> None:
    """Their levels lie on a canvas, overlap, or are no tiles of ours; without these marks we would take them."""
    assert layout(write_pyramid(tmp_path / "a.tiff", RGB, tile=64, levels=2)) is not None
    assert layout(write_pyramid(tmp_path / "a.tiff", RGB, tile=64, levels=2, **tags)) is None


@pytest.mark.parametrize("name", ["none.svs", "short.tiff", "image.png"])
def test_files_that_are_no_tiffs(tmp_path: Path, name: str) -> None:
    content = {"none.svs": b"slide_id,uri", "short.tiff": b"II*\0\xff", "image.png": b"\x89PNG"}
    (tmp_path / name).write_bytes(content[name])
    assert layout(tmp_path / name) is None


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_a_file_that_ends_before_its_first_directory(
    tmp_path: Path, order: str, tile: tuple[int, int] | None, *, big: bool
) -> None:
    """Tiled or not, as long as it is TIFF's header that says where the directory should be."""
    tifffile.imwrite(tmp_path / "whole.tif", RGB, byteorder=order, bigtiff=big, tile=tile, photometric="rgb")
    data = (tmp_path / "whole.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(moved(data, order, big=big))
    assert (layout(tmp_path / "a.tif") is None) == (tile is None)  # strips are for Pillow
    cut(tmp_path / "a.tif", 0.9)
    with pytest.raises(SlideError, match=r"a\.tif: it ends before byte \d+") as caught:
        layout(tmp_path / "a.tif")
    assert caught.value.reason == "truncated"


def moved(data: bytes, order: str, *, big: bool) -> bytes:
    """A TIFF of one directory with that directory at its end, where many writers put it."""
    at, width = (8, 8) if big else (4, 4)
    byteorder: Any = "little" if order == "<" else "big"
    first = int.from_bytes(data[at : at + width], byteorder)
    count = int.from_bytes(data[first : first + (8 if big else 2)], byteorder)
    length = 8 + 20 * count + 8 if big else 2 + 12 * count + 4
    return data[:at] + len(data).to_bytes(width, byteorder) + data[at + width :] + data[first : first + length]


def test_a_chain_of_directories_that_is_cut_off(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", RGB, tile=64)
    cut(path, 0.9)
    with pytest.raises(SlideError, match=r"ends before byte \d+") as caught:
        layout(path)
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("tile", [None, (64, 64)])
@pytest.mark.parametrize(("dtype", "bits"), [(np.uint16, 16), (np.float32, 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_more_than_8_bits_are_refused(
    tmp_path: Path, tile: tuple[int, int] | None, dtype: type[np.generic], bits: int, channels: int
) -> None:
    """In strips or tiles: Pillow and OpenSlide would take the upper byte of some of them."""
    pixels = (RGB.astype(np.uint16) * 16).astype(dtype)
    pixels, photometric = (pixels, "rgb") if channels == 3 else (pixels[..., 0], "minisblack")
    tifffile.imwrite(tmp_path / "deep.tif", pixels, photometric=photometric, tile=tile)
    with pytest.raises(SlideError, match=rf"deep\.tif: {bits} bits a channel; convert it to 8") as caught:
        layout(tmp_path / "deep.tif")
    assert caught.value.reason == "pixel-type"


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_])
def test_up_to_8_bits_are_left_to_who_reads_them(tmp_path: Path, dtype: type[np.generic]) -> None:
    tifffile.imwrite(tmp_path / "a.tif", RGB[..., 0].astype(dtype), photometric="minisblack")
    assert layout(tmp_path / "a.tif") is None


@pytest.mark.parametrize("kind", [9, 1])  # 9: as Aperio marks it
def test_a_tiled_picture_of_the_glass_is_no_level(tmp_path: Path, kind: int) -> None:
    options: dict[str, Any] = {"tile": (64, 64), "compression": "jpeg", "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(RGB, **options)
        tiff.write(np.ascontiguousarray(RGB[::2, ::2]), subfiletype=1, **options)
        tiff.write(np.ascontiguousarray(RGB[100:160, :200]), subfiletype=kind, **options)
        tiff.write(np.ascontiguousarray(RGB[::16, ::16]), subfiletype=1, **options)
    found = layout(tmp_path / "a.tif")
    assert found is not None
    assert [(level.width, level.height) for level in found.levels] == [(313, 271), (157, 136), (20, 17)]


@pytest.mark.parametrize("width", [64, 65, 1013])
def test_levels_of_few_px_are_levels(tmp_path: Path, width: int) -> None:
    rgb = np.zeros((67, width, 3), np.uint8)
    found = layout(write_pyramid(tmp_path / "a.tiff", rgb, tile=64, levels=7))
    assert found is not None
    assert len(found.levels) == 7


def test_a_width_that_is_no_whole_number(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", RGB[:64, :64], tile=64, levels=1)
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages.first.tags[256].offset
    overwrite(path, at + 2, b"\x0b\0" + (1).to_bytes(4, "little") + np.float32(64).tobytes())
    assert layout(path) is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 499), data=st.binary(min_size=1, max_size=8))
def test_a_damaged_directory_is_a_layout_or_none_or_a_slide_error(tmp_path: Path, place: int, data: bytes) -> None:
    path = write_pyramid(tmp_path / "a.tiff", RGB[:64, :64], tile=64, levels=1)
    overwrite(path, path.stat().st_size - 500 + place, data)
    try:
        found = layout(path)
    except SlideError:
        return
    assert found is None or found.pages[0].offsets.dtype == np.uint64
