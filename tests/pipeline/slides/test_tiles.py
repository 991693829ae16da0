"""A level's tiles: what is taken, and what is left or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tifffile

from pipeline.errors import BadTileError, SlideError
from pipeline.slides import tiles
from pipeline.slides.open import open_slide
from pipeline.slides.openslide import OpenSlideReader
from pipeline.slides.tiff import TiffReader
from pipeline.slides.tiles import TiledPage, joined, tiled_page
from pipeline.storage.ranges import LocalSource
from tests.synth import overwrite, tile_span, tissue_rgb, write_tiles

RGB = tissue_rgb(313, 271)
TILE: dict[str, Any] = {"tile": (64, 80), "metadata": None}


def taken(path: Path, number: int = 0) -> TiledPage | None:
    source = LocalSource(path)
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[number]
            assert isinstance(page, tifffile.TiffPage)
            return tiled_page(source, page)
    finally:
        source.close()


@pytest.mark.parametrize("compression", ["none", "lzw", "zlib", "packbits", "zstd"])
def test_px_are_openslides_bit_for_bit_where_it_reads_them(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, compression=compression, photometric="rgb", resolution=(2e4, 2e4), **TILE)
    with open_slide(path) as ours, OpenSlideReader(path) as theirs:
        assert isinstance(ours, TiffReader)
        assert ours.levels == theirs.levels
        assert ours.mpp == pytest.approx(theirs.mpp)
        assert np.array_equal(ours.read(0, 0, 0, 313, 271), theirs.read(0, 0, 0, 313, 271))


@pytest.mark.parametrize("photometric", [2, 6])
def test_jpegs_that_contradict_their_directory_are_read_as_tifffile_reads_them_and_openslide_does_not(
    tmp_path: Path, photometric: int
) -> None:
    def jfif(tile: np.ndarray) -> bytes:
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(tile), quality=95, colorsubsampling="444"))

    path = write_tiles(tmp_path / "a.tif", RGB, 64, jfif, compression=7, photometric=photometric, mpp=0.5)
    with open_slide(path) as ours, OpenSlideReader(path) as theirs:
        found, other = ours.read(0, 0, 0, 313, 271), theirs.read(0, 0, 0, 313, 271)
        raw = ours.raw_tile(0, 1, 2)
        small = ours.read_eighth(0, 0, 0, 64, 64)
    assert np.array_equal(found, tifffile.imread(path))
    assert np.abs(found.astype(int) - RGB).mean() < 4
    assert np.array_equal(found, other) == (photometric == 6)
    assert np.abs(other.astype(int) - RGB).mean() > (40 if photometric == 2 else 0)
    assert raw is not None
    assert np.array_equal(simplejpeg.decode_jpeg(raw), found[128:192, 64:128])
    assert np.abs(small.mean((0, 1)) - RGB[:64, :64].mean((0, 1))).max() < 2


def test_signed_px_are_not_taken(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", RGB.astype(np.int8), photometric="rgb", **TILE)
    assert taken(tmp_path / "a.tif") is None


def test_a_tile_that_is_too_large_to_decode_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", compression="zlib", **TILE)
    monkeypatch.setattr(tiles, "MAX_TILE_PX", 64 * 80 - 1)
    with pytest.raises(
        SlideError, match=r"a\.tif: a tile or strip of 80 x 64 px is over 5119 px; convert it"
    ) as caught:
        open_slide(tmp_path / "a.tif")
    assert caught.value.reason == "too-large"


def planes(path: Path, *options: dict[str, Any]) -> list[TiledPage | None]:
    with tifffile.TiffWriter(path) as tiff:
        for number, more in enumerate(options):
            tiff.write(RGB[..., number], photometric="minisblack", **{**TILE, "compression": "zlib", **more})
    return [taken(path, number) for number in range(len(options))]


def test_planes_that_are_cut_alike_are_joined(tmp_path: Path) -> None:
    """Whatever each is compressed with."""
    found = joined(planes(tmp_path / "a.tif", {}, {"compression": "lzw"}, {}))
    assert found is not None
    assert (found.planes, found.offsets.shape, found.lengths.shape) == (3, (60,), (60,))


def test_planes_that_are_not_cut_alike_are_not_joined(tmp_path: Path) -> None:
    assert joined(planes(tmp_path / "a.tif", {}, {"tile": (80, 64)}, {})) is None
    assert joined([None, *planes(tmp_path / "a.tif", {}, {})]) is None


def three_planes(path: Path, **options: Any) -> Path:
    names = {"axes": "CYX", "Channel": {"Name": ["Red", "Green", "Blue"]}}
    pixels = np.ascontiguousarray(RGB.transpose(2, 0, 1))
    tifffile.imwrite(path, pixels, photometric="minisblack", **{**TILE, "metadata": names, **options})
    return path


@pytest.mark.parametrize("compression", ["zlib", "jpeg"])
def test_a_tile_of_which_one_plane_is_damaged_is_bad(tmp_path: Path, compression: str) -> None:
    path = three_planes(tmp_path / "a.ome.tif", compression=compression)
    offset, length = tile_span(path, 1, 6)  # of green, row 1, column 2
    overwrite(path, offset + length // 2, bytes(length - length // 2))
    with open_slide(path) as reader:
        assert np.abs(reader.read(0, 0, 0, 160, 271).astype(int) - RGB[:, :160]).mean() < 9
        with pytest.raises(BadTileError, match="level 0, tile at x 160, y 64"):
            reader.read(0, 170, 70, 9, 9)


def test_a_tile_of_which_one_plane_is_absent_is_bad_and_one_without_any_is_glass(tmp_path: Path) -> None:
    path = three_planes(tmp_path / "a.ome.tif", compression="zlib")
    for number in range(3):
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[number]
            assert isinstance(page, tifffile.TiffPage)
            tag = page.tags[325]
            size = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
        overwrite(path, tag.valueoffset + 6 * size, bytes(size))
        with open_slide(path) as reader:
            if number < 2:
                with pytest.raises(BadTileError, match="a plane of it is absent"):
                    reader.read(0, 170, 70, 9, 9)
            else:
                assert (reader.read(0, 170, 70, 9, 9) == 255).all()


def test_tiles_of_no_file_of_their_own_are_not_passed_on(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", compression="zlib", **TILE)
    with open_slide(tmp_path / "a.tif") as reader:
        found = reader.native_tiles(0)
        assert found is not None
        assert (found.width, found.height, found.columns, found.rows, found.codec) == (80, 64, 4, 5, "other")
        assert not reader.has_eighths(0)


def test_grey_jpegs_whose_tables_stand_in_the_directory(tmp_path: Path) -> None:
    pyvips = pytest.importorskip("pyvips")
    path, grey = tmp_path / "a.tif", np.ascontiguousarray(RGB[..., 1])
    written = pyvips.Image.new_from_array(grey)
    written.tiffsave(str(path), tile=True, tile_width=64, tile_height=80, compression="jpeg", Q=95, pyramid=True)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages.first.jpegtables is not None
    with open_slide(path) as reader:
        found = reader.read(0, 0, 0, 313, 271)
        assert len(reader.levels) > 1
    assert np.array_equal(found, np.stack([tifffile.imread(path)] * 3, -1))
    assert np.abs(found.astype(int)[..., 0] - grey).mean() < 4


@pytest.mark.parametrize("compression", ["zlib", "jpeg"])
def test_one_strip_of_more_rows_than_there_are(tmp_path: Path, compression: str) -> None:
    """2^32 - 1 of them is TIFF's default."""
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", compression=compression, rowsperstrip=271)
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages.first.tags["RowsPerStrip"]
        at, size = tag.valueoffset, {3: 2, 4: 4}[int(tag.dtype)]
    overwrite(path, at, b"\xff" * size)
    with open_slide(path) as reader:
        assert isinstance(reader, TiffReader)
        assert np.abs(reader.read(0, 0, 0, 313, 271).astype(int) - RGB).mean() < 9


def test_jpegs_of_colours_with_transparency_are_not_taken_for_cmyk(tmp_path: Path) -> None:
    path, pixels = tmp_path / "a.tif", np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=["unassalpha"], compression="zlib", **TILE)
    assert taken(path) is not None
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages.first.tags["Compression"].valueoffset
    overwrite(path, at, b"\7\0")
    assert taken(path) is None
