"""The raw TIFF reader: OpenSlide's pixels bit for bit, each tile decoded once, a bad tile costs that tile."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import BadTileError, SlideError
from pipeline.slides import tiff as slide_tiff
from pipeline.slides import tiles
from pipeline.slides.open import open_slide
from pipeline.slides.openslide import OpenSlideReader
from pipeline.slides.reader import RGB, SlideReader
from pipeline.slides.tiff import TiffReader
from pipeline.slides.tiles import TiledPage
from pipeline.tiling.tissue import find_tissue
from tests.synth import cut, overwrite, philips_xml, tile_span, tissue_rgb, write_pyramid, zero_tile

PICTURE = tissue_rgb(613, 487)
APERIO = "Aperio Image Library v10.0\r\n613x487 (240x240) JPEG/RGB Q=90|AppMag = 20|MPP = 0.4991"
VARIANTS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": "444"},
    "4:2:2": {"subsampling": "422", "shared": True, "tile": 256},
    "4:2:0": {"subsampling": "420", "shared": True},
    "RGB with shared tables": {"photometric": "rgb", "shared": True, "tile": 128},
    "Aperio": {"photometric": "rgb", "shared": True, "description": APERIO},
    "Philips": {"shared": True, "software": "Philips DP v1.0", "description": philips_xml(3, 0.25), "mpp": 0.25},
    "sparse": {"sparse": {0, 4}},
}


def same_levels(one: SlideReader, other: SlideReader) -> bool:
    return one.levels == other.levels and one.mpp == pytest.approx(other.mpp) and one.vendor == other.vendor


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tiff", PICTURE, subsampling="420", shared=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_level0_equals_openslide_bit_for_bit(tmp_path: Path, variant: str) -> None:
    path = write_pyramid(tmp_path / "a.tiff", PICTURE, **VARIANTS[variant])
    with open_slide(path) as ours, OpenSlideReader(path) as theirs:
        assert isinstance(ours, TiffReader)
        assert same_levels(ours, theirs)
        assert np.array_equal(ours.read(0, 0, 0, 613, 487), theirs.read(0, 0, 0, 613, 487))
        assert np.array_equal(ours.read(0, 101, 217, 333, 199), theirs.read(0, 101, 217, 333, 199))


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_real_slides_equal_openslide_bit_for_bit(shared_slides: Path, name: str) -> None:
    with open_slide(shared_slides / name) as ours, OpenSlideReader(shared_slides / name) as theirs:
        assert isinstance(ours, TiffReader)
        assert same_levels(ours, theirs)
        for x, y in ((0, 0), (901, 1203), (1720, 2467)):
            assert np.array_equal(ours.read(0, x, y, 500, 500), theirs.read(0, x, y, 500, 500))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_every_pixel_of_real_slides_equals_openslide(shared_slides: Path, name: str) -> None:
    with open_slide(shared_slides / name) as ours, OpenSlideReader(shared_slides / name) as theirs:
        width, height = ours.dimensions
        for top in range(0, height, 511):
            box = (0, top, width, min(511, height - top))
            assert np.array_equal(ours.read(0, *box), theirs.read(0, *box))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_box_is_the_cut_out_of_its_level(slide: Path, data: st.DataObject) -> None:
    with open_slide(slide) as reader:
        for _ in range(3):
            number = data.draw(st.integers(0, 2))
            level = reader.levels[number]
            x, y = data.draw(st.integers(0, level.width - 1)), data.draw(st.integers(0, level.height - 1))
            w, h = data.draw(st.integers(1, level.width - x)), data.draw(st.integers(1, level.height - y))
            whole = reader.read(number, 0, 0, level.width, level.height)
            assert np.array_equal(reader.read(number, x, y, w, h), whole[y : y + h, x : x + w])


def test_other_levels_stand_on_their_own_grid(slide: Path) -> None:
    with tifffile.TiffFile(slide) as tiff, open_slide(slide) as reader:
        page = tiff.pages[1]
        assert isinstance(page, tifffile.TiffPage)
        assert np.array_equal(reader.read(1, 100, 60, 150, 90), page.asarray()[60:150, 100:250])


def test_ome_tiff(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    meta: dict[str, Any] = {"axes": "YXS", "PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25}
    options: dict[str, Any] = {"tile": (128, 128), "compression": "jpeg", "photometric": "rgb"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(PICTURE, subifds=1, metadata=meta, **options)
        tiff.write(np.ascontiguousarray(PICTURE[::2, ::2]), subfiletype=1, **options)
    with open_slide(path) as ours, OpenSlideReader(path) as theirs:
        assert isinstance(ours, TiffReader)
        assert (ours.vendor, ours.mpp) == ("ome-tiff", (0.25, 0.25))
        assert [(level.width, level.height) for level in ours.levels] == [(613, 487), (307, 244)]
        assert np.array_equal(ours.read(0, 7, 9, 500, 400), theirs.read(0, 7, 9, 500, 400))
        assert np.abs(ours.read(1, 0, 0, 307, 244).astype(int) - PICTURE[::2, ::2]).mean() < 8


def test_jpeg_2000_that_openslide_refuses_outside_aperio(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PICTURE, tile=(128, 128), compression="APERIO_JP2000_RGB", photometric="rgb")
    with open_slide(path) as reader:
        assert np.array_equal(reader.read(0, 5, 7, 300, 200), PICTURE[7:207, 5:305])
        tiles, codestream = reader.native_tiles(0), reader.raw_tile(0, 1, 2)
    assert tiles is not None
    assert tiles.codec == "jpeg2000"
    assert codestream is not None
    assert np.array_equal(imagecodecs.jpeg2k_decode(codestream), PICTURE[256:384, 128:256])


@pytest.mark.parametrize("variant", ["palette", "aperio with gaps"])
def test_what_is_left_to_others(tmp_path: Path, variant: str) -> None:
    path = tmp_path / "a.tif"
    tile: dict[str, Any] = {"tile": (128, 128)}
    match variant:
        case "palette":
            colours = np.arange(3 * 256, dtype=np.uint16).reshape(3, 256)
            tifffile.imwrite(path, PICTURE[..., 0], photometric="palette", colormap=colours, **tile)
        case _:
            write_pyramid(path, PICTURE, shared=True, description=APERIO, sparse={2})
    with open_slide(path) as reader:
        assert not isinstance(reader, TiffReader)
        assert reader.native_tiles(0) is None


def test_raw_tiles_are_files_of_their_own(tmp_path: Path) -> None:
    for number, variant in enumerate(["4:2:0", "Aperio", "4:4:4"]):
        path = write_pyramid(tmp_path / f"{number}.tiff", PICTURE, **VARIANTS[variant])
        with open_slide(path) as reader:
            tiles = reader.native_tiles(1)
            assert tiles is not None
            assert (tiles.width, tiles.height, tiles.columns, tiles.rows, tiles.codec) == (240, 240, 2, 2, "jpeg")
            data = reader.raw_tile(1, 1, 1)
            assert data is not None
            assert np.array_equal(simplejpeg.decode_jpeg(data)[:3, :66], reader.read(1, 240, 240, 66, 3))


def test_a_tile_without_data_is_white_and_has_no_bytes(tmp_path: Path) -> None:
    with open_slide(write_pyramid(tmp_path / "a.tiff", PICTURE, sparse={1})) as reader:
        assert reader.raw_tile(0, 1, 0) is None
        assert (reader.read(0, 240, 0, 240, 240) == 255).all()


def test_each_tile_is_decoded_once_while_boxes_come_row_by_row(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode = [], tiles.decoded

    def counted(page: TiledPage, parts: Sequence[bytes], number: int, out: RGB) -> RGB:
        decoded.append(1)
        return decode(page, parts, number, out)

    monkeypatch.setattr(slide_tiff, "decoded", counted)
    monkeypatch.setattr(slide_tiff, "CACHE_PX", 5 * 240**2)  # 3 columns of tiles
    boxes = np.array([(x, y, 100, 90) for y in range(13, 390, 90) for x in range(7, 510, 100)])
    with open_slide(slide) as reader:
        reader.expect(0, boxes)
        read = [reader.read(0, *box) for box in boxes.tolist()]
        assert len(decoded) == 6
        again = [reader.read(0, *box) for box in boxes.tolist()[::-1]]
    assert all(np.array_equal(one, other) for one, other in zip(read, again[::-1], strict=True))


class Whole(TiffReader):
    """Decodes in full what the reader decodes as an eighth."""

    def read_eighth(self, level: int, x: int, y: int, w: int, h: int) -> RGB:
        return np.asarray(Image.fromarray(self.read(level, x, y, w, h)).reduce(8))


def in_full(reader: SlideReader) -> SlideReader:
    assert isinstance(reader, TiffReader)
    reader.__class__ = Whole
    return reader


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), variant=st.sampled_from(["4:4:4", "4:2:2", "4:2:0", "Aperio", "sparse"]))
def test_an_eighth_is_the_mean_of_8_by_8_px(tmp_path: Path, data: st.DataObject, variant: str) -> None:
    path = tmp_path / f"{variant}.tiff"
    if not path.exists():
        write_pyramid(path, PICTURE, **VARIANTS[variant])
    x, y = 8 * data.draw(st.integers(0, 76)), 8 * data.draw(st.integers(0, 60))
    w, h = (min(8 * data.draw(st.integers(1, 80)), end - start) for start, end in ((x, 613), (y, 487)))
    with open_slide(path) as reader, open_slide(path) as other:
        assert reader.has_eighths(0)
        whole, mean = (one.read_eighth(0, 0, 0, 613, 487) for one in (reader, in_full(other)))
        small = reader.read_eighth(0, x, y, w, h)
    assert whole.shape == mean.shape == (61, 77, 3)
    assert np.array_equal(small, whole[y // 8 : -(-(y + h) // 8), x // 8 : -(-(x + w) // 8)])
    apart = np.abs(whole.astype(int) - mean)
    # px are cut off at 0 and 255, and what was coded is not; chroma of half the columns is smoothed across blocks
    assert apart.max() <= (30 if variant == "4:2:2" else 6)
    assert apart.mean() < 0.8  # a px beside its place: 2.5


def test_the_mask_of_one_level_is_that_of_a_full_read_to_a_thousandth(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(1409, 1103, seed=4), levels=1, subsampling="420", shared=True)
    with open_slide(path) as reader, open_slide(path) as again, open_slide(path) as other:
        found, full = reader.overview(130), in_full(other).overview(130)  # 10 px to one: eighths, resized
        assert np.array_equal(found.rgb, again.overview(130).rgb)
    assert found.scale == full.scale
    assert np.abs(found.rgb.astype(int) - full.rgb).max() <= 8
    ours, theirs = find_tissue(found.rgb).mask, find_tissue(full.rgb).mask
    assert 0.2 < theirs.mean() < 0.5
    assert (ours != theirs).mean() < 0.001


def test_an_overview_decodes_only_the_tiles_at_a_ragged_edge_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, decode = [], tiles.decoded

    def counted(page: TiledPage, parts: Sequence[bytes], number: int, out: RGB) -> RGB:
        decoded.append(1)
        return decode(page, parts, number, out)

    monkeypatch.setattr(tiles, "decoded", counted)
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(1208, 967), levels=1)  # 1208 = 8 * 151; 6 x 5 tiles
    with open_slide(path) as reader:
        reader.overview(100)
    assert len(decoded) == 6


def test_what_lies_beyond_the_edge_does_not_count(tmp_path: Path) -> None:
    picture, path = np.full((480, 720, 3), (250, 0, 250), np.uint8), tmp_path / "a.tif"
    picture[:309, :453] = (200, 190, 30)
    tiles = [
        simplejpeg.encode_jpeg(np.ascontiguousarray(picture[y : y + 240, x : x + 240]), quality=100)
        for y in (0, 240)
        for x in (0, 240)
    ]
    options: dict[str, Any] = {"tile": (240, 240), "compression": "jpeg", "photometric": "ycbcr", "subsampling": (1, 1)}
    tifffile.imwrite(path, iter(tiles), shape=(309, 453, 3), dtype=np.uint8, **options)
    with open_slide(path) as reader:
        assert isinstance(reader, TiffReader)
        small = reader.read_eighth(0, 0, 0, 453, 309)
    assert np.abs(small.astype(int) - (200, 190, 30)).max() <= 40  # of the last px, by the block that the edge cuts
    assert np.abs(small[:-1, :-1].astype(int) - (200, 190, 30)).max() <= 3


def test_a_bad_tile_of_an_eighth_is_that_tile(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(1409, 1103), levels=1)
    zero_tile(path, 0, 6)
    with open_slide(path) as reader, open_slide(path) as other:
        with pytest.raises(BadTileError, match="tile at x 0, y 240"):
            reader.read_eighth(0, 8, 248, 16, 16)
        found, full = reader.overview(130), in_full(other).overview(130)
    assert found.unread.any()
    assert np.array_equal(found.unread, full.unread)


def test_jpeg_2000_has_no_eighths(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PICTURE, tile=(128, 128), compression="APERIO_JP2000_RGB", photometric="rgb")
    with open_slide(path) as reader:
        assert not reader.has_eighths(0)
        assert reader.overview(60).rgb.shape == (48, 60, 3)


def test_decoded_tiles_do_not_pile_up(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slide_tiff, "CACHE_PX", 4 * 240**2)
    with open_slide(slide) as reader:
        assert isinstance(reader, TiffReader)
        for y in (0, 100, 200, 300, 380, 100, 0):  # down, and back up
            for x in (0, 200, 400):
                reader.read(0, x, y, 100, 100)
                assert reader._decoded._px <= 4 * 240**2
        reader.read(0, 0, 300, 100, 100)
        assert set(reader._decoded._rows) == {1}  # what lies above is dropped


def test_what_is_forgotten_is_read_again(slide: Path) -> None:
    with open_slide(slide) as reader:
        assert isinstance(reader, TiffReader)
        before = reader.read(0, 0, 0, 613, 487), reader.read_eighth(0, 0, 0, 613, 487)
        reader.forget()
        assert reader._decoded._rows == reader._shrunk._rows == {}
        assert np.array_equal(reader.read(0, 0, 0, 613, 487), before[0])
        assert np.array_equal(reader.read_eighth(0, 0, 0, 613, 487), before[1])


def test_expected_or_not_the_pixels_are_the_same(slide: Path) -> None:
    boxes = np.array([(x, y, 100, 90) for y in (0, 200, 300) for x in (500, 3, 250)])
    with open_slide(slide) as told, open_slide(slide) as untold:
        told.expect(0, boxes[2:])
        for box in boxes.tolist():
            assert np.array_equal(told.read(0, *box), untold.read(0, *box))


def spoilt(data: bytes, kind: str) -> bytes:
    scan = data.index(b"\xff\xda") + 14
    return {
        "zeroed": bytes(len(data)),
        "bits flipped": bytes(byte ^ 255 for byte in data),
        "cut short": data[: scan + 40] + bytes(len(data) - scan - 40),
        "other data": data[: scan + 40] + np.random.default_rng(1).bytes(len(data) - scan - 40),
    }[kind]


@pytest.mark.parametrize("kind", ["zeroed", "bits flipped", "cut short", "other data"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_bad_tile_costs_that_tile(tmp_path: Path, kind: str, *, shared: bool) -> None:
    path = write_pyramid(tmp_path / "a.tiff", PICTURE, shared=shared)
    offset, length = tile_span(path, 0, 4)  # column 1, row 1
    overwrite(path, offset, spoilt(path.read_bytes()[offset : offset + length], kind))
    with open_slide(path) as reader:
        for _ in range(2):
            with pytest.raises(BadTileError, match=r"a\.tiff: level 0, tile at x 240, y 240: "):
                reader.read(0, 200, 200, 100, 100)
            with pytest.raises(BadTileError, match=r"tile at x 240, y 240"):
                reader.raw_tile(0, 1, 1)
        assert np.abs(reader.read(0, 240, 0, 240, 240).astype(int) - PICTURE[:240, 240:480]).mean() < 5
        assert reader.raw_tile(0, 1, 0)


@pytest.mark.parametrize("kind", ["zeros from the middle on", "a block of zeros"])
def test_a_damaged_tile_of_jpeg_2000_costs_that_tile(tmp_path: Path, kind: str) -> None:
    """Its decoder fills what is lost with smooth colour, and says nothing."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PICTURE, tile=(128, 128), compression="APERIO_JP2000_RGB", photometric="rgb")
    offset, length = tile_span(path, 0, 6)  # the second one of the second row
    overwrite(path, offset + length // 2, bytes(length - length // 2 if kind.endswith("on") else 512))
    with open_slide(path) as reader:
        for read in (lambda: reader.read(0, 130, 130, 9, 9), lambda: reader.raw_tile(0, 1, 1)):
            with pytest.raises(BadTileError, match=r"tile at x 128, y 128: .*(end marker|zeros)"):
                read()
        assert np.array_equal(reader.read(0, 0, 0, 128, 128), PICTURE[:128, :128])


def rewrite_table(path: Path, code: int, number: int, value: int) -> None:
    with tifffile.TiffFile(path) as tiff:
        place = tiff.pages.first.tags[code].valueoffset + 4 * number
    overwrite(path, place, struct.pack("<I", value))


@pytest.mark.parametrize(("code", "value"), [(325, 60), (325, 2**31), (324, 2**32 - 10_000), (324, 0)])
def test_a_wrong_entry_of_the_directory_costs_that_tile(tmp_path: Path, code: int, value: int) -> None:
    path = write_pyramid(tmp_path / "a.tiff", PICTURE)
    rewrite_table(path, code, 4, value)
    with open_slide(path) as reader:
        with pytest.raises(BadTileError, match="tile at x 240, y 240"):
            reader.read(0, 250, 250, 9, 9)
        with pytest.raises(BadTileError, match="tile at x 240, y 240"):
            reader.raw_tile(0, 1, 1)
        assert reader.read(0, 0, 0, 240, 240).mean() > 100


def test_too_long_an_entry_does_not_matter(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", PICTURE)
    with open_slide(path) as reader:
        pixels, data = reader.read(0, 240, 240, 240, 240), reader.raw_tile(0, 1, 1)
    rewrite_table(path, 325, 4, tile_span(path, 0, 4)[1] + 30)
    with open_slide(path) as reader:
        assert np.array_equal(reader.read(0, 240, 240, 240, 240), pixels)
        assert reader.raw_tile(0, 1, 1) == data


def test_bad_shared_tables_cost_the_slide(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", PICTURE, shared=True)
    with tifffile.TiffFile(path) as tiff:
        tags = [page.tags[347] for page in tiff.pages]
    for tag in tags:
        overwrite(path, tag.valueoffset + 2, bytes(tag.count - 4))
    with open_slide(path) as reader, pytest.raises(SlideError) as caught:
        reader.overview(200)
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize("share", [0.9, 0.5, 0.01])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = write_pyramid(tmp_path / "a.tiff", PICTURE)
    cut(path, share)
    with pytest.raises(SlideError, match="a.tiff"):
        open_slide(path)


def test_a_file_truncated_behind_its_directories_loses_what_is_gone(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", PICTURE, levels=1)
    path.write_bytes(path.read_bytes() + bytes(8000))
    rewrite_table(path, 324, 8, path.stat().st_size - 4000)  # the last tile lies behind the directory, and is cut off
    with open_slide(path) as reader:
        with pytest.raises(BadTileError, match="beyond the end of the file"):
            reader.read(0, 480, 480, 10, 7)
        assert reader.read(0, 0, 0, 100, 100).mean() > 100


def test_a_slide_cut_off_while_it_is_open_loses_tiles(slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    path.write_bytes(slide.read_bytes())
    with open_slide(path) as reader:
        cut(path, 0.02)
        with pytest.raises(BadTileError, match="the file ends within it"):
            reader.read(0, 480, 300, 100, 100)


def test_a_slide_replaced_while_it_is_open_is_read_as_it_was(slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    path.write_bytes(slide.read_bytes())
    with open_slide(path) as reader, open_slide(slide) as original:
        path.unlink()
        zero_tile(write_pyramid(path, PICTURE), 0, 0)
        assert np.array_equal(reader.read(0, 0, 0, 300, 300), original.read(0, 0, 0, 300, 300))


def test_one_pixel(tmp_path: Path) -> None:
    pixel = np.full((1, 1, 3), 77, np.uint8)
    path = write_pyramid(tmp_path / "a.tiff", pixel, levels=1)
    with open_slide(path) as ours, OpenSlideReader(path) as theirs:
        assert np.array_equal(ours.read(0, 0, 0, 1, 1), theirs.read(0, 0, 0, 1, 1))
        assert ours.overview(512).rgb.shape == (1, 1, 3)


def test_more_than_2_31_px(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    edge, tile = 65_536, 4096  # 2^32 px in 256 tiles, nearly all of them declared empty
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(np.full((tile, tile, 3), (200, 100, 150), np.uint8)))
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            iter([jpeg] + [b""] * 255),
            shape=(edge, edge, 3),
            dtype=np.uint8,
            tile=(tile, tile),
            compression="jpeg",
            photometric="ycbcr",
            subsampling=(1, 1),
        )
    with open_slide(path) as reader:
        assert isinstance(reader, TiffReader)
        assert reader.dimensions == (edge, edge)
        assert (reader.read(0, edge - 300, edge - 200, 300, 200) == 255).all()
        assert abs(int(reader.read(0, 4000, 10, 50, 50)[0, 0, 1]) - 100) <= 1
