"""Readers: pixels as the file has them, one bad tile costs one read, every bad file its own reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import simplejpeg
from PIL import Image

from pipeline.errors import BadTileError, SlideError
from pipeline.slides.open import SlideReader, open_slide, open_uri, tool_versions
from pipeline.slides.openslide import OpenSlideReader
from pipeline.slides.tiff import TiffReader
from pipeline.storage.ranges import GAP
from pipeline.storage.staging import Staging
from tests.s3 import S3Server
from tests.synth import cut, overwrite, tile_span, tissue_rgb, write_pyramid

RGB = tissue_rgb(1013, 787)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "Schnitt 1 ä.tiff", RGB)


def test_facts_of_a_pyramid(slide: Path) -> None:
    with open_slide(slide) as reader:
        assert reader.dimensions == (1013, 787)
        assert [(lv.width, lv.height) for lv in reader.levels] == [(1013, 787), (506, 393), (253, 196)]
        assert reader.levels[1].downsample == pytest.approx(2.0, rel=2e-3)
        assert reader.mpp == pytest.approx((0.5, 0.5))
        assert reader.vendor == "generic-tiff"


both = pytest.mark.parametrize("opened", [open_slide, OpenSlideReader])


@both
def test_level0_pixels_are_those_of_the_tiles(slide: Path, opened: Callable[[Path], SlideReader]) -> None:
    offset, length = tile_span(slide, 0, 1)  # tile row 0, column 1
    tile = simplejpeg.decode_jpeg(slide.read_bytes()[offset : offset + length])
    with opened(slide) as reader:
        got = reader.read(0, 240, 0, 240, 240)
    assert got.dtype == np.uint8
    assert np.array_equal(got, tile)


@both
def test_boxes_are_placed_in_the_px_of_their_level(slide: Path, opened: Callable[[Path], SlideReader]) -> None:
    with opened(slide) as reader:
        at1, at0 = reader.read(1, 101, 67, 53, 31), reader.read(0, 202, 134, 106, 62)
    halved = np.asarray(Image.fromarray(at0).resize((53, 31), Image.Resampling.BOX))
    assert at1.shape == (31, 53, 3)
    assert np.abs(at1.astype(int) - halved).mean() < 6
    assert np.abs(at1.astype(int) - halved[::-1]).mean() > 6


@pytest.mark.parametrize(
    ("opened", "where"), [(open_slide, "level 0, tile at x 240, y 0"), (OpenSlideReader, "level 0, x 230, y 0")]
)
@pytest.mark.parametrize("spoil", ["zeroed", "bits flipped", "cut short"])
def test_a_bad_tile_costs_only_the_reads_that_touch_it(
    slide: Path, spoil: str, opened: Callable[[Path], SlideReader], where: str
) -> None:
    with opened(slide) as reader:
        neighbour = reader.read(0, 480, 0, 240, 240)
    offset, length = tile_span(slide, 0, 1)
    data = slide.read_bytes()[offset : offset + length]
    spoilt = {
        "zeroed": bytes(length),
        "bits flipped": bytes(b ^ 255 for b in data),
        "cut short": data[:20] + bytes(length - 20),
    }
    overwrite(slide, offset, spoilt[spoil])
    with opened(slide) as reader:
        for _ in range(2):
            with pytest.raises(BadTileError, match=where) as caught:
                reader.read(0, 230, 0, 20, 20)
            assert caught.value.reason == "bad-tile"
            assert np.array_equal(reader.read(0, 480, 0, 240, 240), neighbour)


def test_sparse_tiles_are_white(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "sparse.tiff", RGB, levels=1, sparse={0})
    with open_slide(path) as reader:
        assert (reader.read(0, 0, 0, 240, 240) == 255).all()
        assert reader.read(0, 240, 240, 240, 240).mean() < 220


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(("name", "share"), [("x.png", 0.5), ("x.jpg", 0.5), ("x.tiff", 0.5)])
def test_truncated_files(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    if name.endswith("tiff"):
        write_pyramid(path, RGB)
    else:
        Image.fromarray(RGB).save(path)
    cut(path, share)
    with pytest.raises(SlideError, match="x\\.") as caught:
        open_slide(path)
    assert caught.value.reason in ({"truncated"} if name.endswith("tiff") else {"unreadable"})


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none.svs", "missing"), ("folder", "directory"), ("empty.svs", "empty-file"), ("text.svs", "not-a-slide")],
)
def test_files_that_are_no_slides(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.svs").touch()
    (tmp_path / "text.svs").write_text("slide_id,uri\n")
    with pytest.raises(SlideError, match=name) as caught:
        open_slide(tmp_path / name)
    assert caught.value.reason == reason


def test_real_slides(shared_slides: Path, tmp_path: Path) -> None:
    with open_slide(shared_slides / "CMU-1-Small-Region.svs") as reader:
        assert (reader.dimensions, reader.mpp, reader.vendor) == ((2220, 2967), (0.499, 0.499), "aperio")
    with open_slide(shared_slides / "TCGA-CR-7395-01A-01-TS1.svs") as reader:
        assert (reader.dimensions, reader.mpp, len(reader.levels)) == ((4443, 3567), None, 2)
    with pytest.raises(SlideError) as caught:
        open_slide(shared_slides / "unopenable.tiff")
    assert caught.value.reason == "unopenable"
    with open_slide(Path(shutil.copy(shared_slides / "unreadable.svs", tmp_path))) as reader:
        with pytest.raises(SlideError) as caught:
            reader.overview(512)
        assert caught.value.reason == "unreadable"


def test_tool_versions() -> None:
    assert tool_versions()["openslide"] == openslide.__library_version__


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server.folder / "slides"


def no_files() -> list[str]:
    raise AssertionError("a slide that is read in place needs no copy")


def test_a_remote_slide_is_read_in_place_and_only_what_is_needed_travels(bucket: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 1300, 3), np.uint8)  # 3 MB in 3 levels
    path = write_pyramid(bucket / "große Datei.tiff", noise, tile=128, quality=98)
    boxes = np.array([(x, y, 112, 112) for y in range(0, 336, 112) for x in range(0, 336, 112)])
    with open_slide(path) as local, open_uri("s3://slides/große Datei.tiff", no_files, Staging()) as remote:
        assert isinstance(remote, TiffReader)
        assert remote.levels == local.levels
        opening = remote.bytes_read
        remote.expect(1, boxes)
        for box in boxes.tolist():
            assert np.array_equal(remote.read(1, *box), local.read(1, *box))
        travelled = remote.bytes_read - opening
    needed = sum(tile_span(path, 1, 6 * row + column)[1] for row in range(3) for column in range(3))
    assert needed <= travelled <= 1.05 * needed + 3 * GAP  # rows of tiles lie apart: each gap may be read along
    assert opening < 500_000
    assert travelled < path.stat().st_size / 8


def test_a_remote_slide_that_cannot_be_read_in_place_is_copied(bucket: Path, tmp_path: Path) -> None:
    Image.fromarray(RGB).save(bucket / "plain.png")
    staging = Staging(str(tmp_path))
    with open_uri("s3://slides/plain.png", lambda: ["s3://slides/plain.png"], staging) as reader:
        assert np.array_equal(reader.read(0, 7, 11, 13, 17), RGB[11:28, 7:20])
    assert [path.name for path in tmp_path.glob("*/files/*")] == ["plain.png"]


def test_a_local_uri(slide: Path) -> None:
    for uri in (str(slide), slide.as_uri()):
        with open_uri(uri, no_files, Staging()) as reader:
            assert reader.dimensions == (1013, 787)


def test_a_remote_slide_that_is_gone(bucket: Path) -> None:
    with (
        pytest.raises(SlideError, match="none.svs") as caught,
        open_uri("s3://slides/none.svs", no_files, Staging()),
    ):
        pass
    assert caught.value.reason == "missing"


def test_a_remote_slide_that_vanishes_while_it_is_read(bucket: Path) -> None:
    path = write_pyramid(bucket / "gone.tiff", RGB)
    with open_uri("s3://slides/gone.tiff", no_files, Staging()) as reader:
        path.unlink()
        with pytest.raises(SlideError, match="gone.tiff") as caught:
            reader.read(0, 0, 0, 10, 10)
    assert not isinstance(caught.value, BadTileError)
    assert caught.value.reason in {"missing", "source"}
