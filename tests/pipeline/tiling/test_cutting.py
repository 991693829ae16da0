"""Patches as JPEGs: the slide's own tiles where a patch is exactly one, encoded anew everywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.slides.open import open_slide
from pipeline.tiling import cutting
from pipeline.tiling.slide import PatchRow, tile_slide
from tests.synth import overwrite, tile_span, tissue_rgb, write_pyramid, zero_tile

RGB = tissue_rgb(613, 487)


def rows(path: Path, **fields: object) -> list[PatchRow]:
    with open_slide(path) as reader:
        return list(tile_slide(reader, spec(**fields), 0.5).rows())


def spec(**fields: object) -> TilingConfig:
    return TilingConfig.model_validate(
        {"patch_px": 64, "tissue": "none", "max_bad_tiles": 0.5, "edge": "drop", **fields}
    )


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tiff", RGB, tile=64, subsampling="420", shared=True)


def test_aligned_patches_keep_the_slides_own_bytes(slide: Path) -> None:
    found = rows(slide)
    assert len(found) == 9 * 7  # the last column and row of tiles reach over the edge: no patches
    with open_slide(slide) as reader:
        for row in found:
            offset, length = tile_span(slide, 0, row.y // 64 * 10 + row.x // 64)
            tile = slide.read_bytes()[offset : offset + length]
            assert row.image.endswith(tile[tile.index(b"\xff\xda") :])
            assert np.array_equal(simplejpeg.decode_jpeg(row.image), reader.read(0, row.x, row.y, 64, 64))
    assert simplejpeg.decode_jpeg_header(found[0].image)[3] == "420"
    assert rows(slide) == found


def test_pixels_are_those_of_the_other_codecs_but_for_their_encoding(slide: Path) -> None:
    original, encoded = rows(slide, codec="original"), rows(slide, codec="encoded", jpeg_quality=100)
    assert rows(slide, codec="checked") == original
    for one, other in zip(original, encoded, strict=True):
        assert (one.x, one.y, one.level) == (other.x, other.y, other.level)
        assert one.image != other.image
        pixels = [simplejpeg.decode_jpeg(row.image).astype(int) for row in (one, other)]
        assert np.abs(pixels[0] - pixels[1]).mean() < 1.5


@pytest.mark.parametrize(
    ("fields", "original"),
    [
        ({}, True),
        ({"mpp": 0.52}, True),  # within the tolerance
        ({"mpp": 1.0}, True),  # level 1 as it is
        ({"overlap_px": 32}, False),  # every second patch of every second row stands on a tile
        ({"mpp": 0.7}, False),
        ({"patch_px": 63}, False),
        ({"patch_px": 128}, False),
    ],
)
def test_when_a_patch_is_one_tile(slide: Path, fields: dict[str, Any], *, original: bool) -> None:
    found = rows(slide, **fields)
    kept = [simplejpeg.decode_jpeg_header(row.image)[3] == "420" for row in found]
    if "overlap_px" in fields:
        assert kept == [row.x % 64 == 0 and row.y % 64 == 0 for row in found]
    else:
        assert set(kept) == {original}


def test_the_codec_enters_the_fingerprint() -> None:
    assert len({spec(codec=codec).fingerprint() for codec in ("original", "checked", "encoded")}) == 3


def test_rgb_tiles_decode_in_their_colours(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", RGB, tile=64, photometric="rgb", shared=True)
    for row in rows(path)[::5]:
        pixels = simplejpeg.decode_jpeg(row.image).astype(int)
        assert np.abs(pixels - RGB[row.y : row.y + 64, row.x : row.x + 64]).mean() < 5


def test_where_the_slide_holds_no_data_the_patch_is_white(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", RGB, tile=64, sparse={0})
    first, second, *_ = rows(path)
    assert (simplejpeg.decode_jpeg(first.image) == 255).all()
    assert simplejpeg.decode_jpeg(second.image).mean() < 250


def test_native_takes_the_slides_tiles(slide: Path) -> None:
    with open_slide(slide) as reader:
        tiling = tile_slide(reader, spec(patch_px="native"), 0.5)
        assert (int(tiling.grid.patch_px), int(tiling.grid.read_px)) == (64, 64)
        assert list(tiling.rows()) == rows(slide)
    assert spec(patch_px="native").fingerprint() != spec().fingerprint()


def test_native_needs_tiles(tmp_path: Path) -> None:
    Image.fromarray(tissue_rgb(211, 157)).save(tmp_path / "plain.png")
    with open_slide(tmp_path / "plain.png") as reader, pytest.raises(SlideError, match="native") as caught:
        tile_slide(reader, spec(patch_px="native", mpp=None), None)
    assert caught.value.reason == "no-tiles"


def spoil(path: Path, number: int, kind: str) -> None:
    offset, length = tile_span(path, 0, number)
    data = path.read_bytes()[offset : offset + length]
    scan = data.index(b"\xff\xda") + 14
    match kind:
        case "zeroed":
            zero_tile(path, 0, number)
        case "bits flipped":
            overwrite(path, offset, bytes(byte ^ 255 for byte in data))
        case "cut short":
            overwrite(path, offset + scan + 9, bytes(length - scan - 9))
        case "overwritten":
            overwrite(path, offset + scan, np.random.default_rng(0).bytes(length - scan))


@pytest.mark.parametrize("kind", ["zeroed", "bits flipped", "cut short", "overwritten"])
@pytest.mark.parametrize("codec", ["original", "checked", "encoded"])
def test_a_bad_tile_costs_its_patch_and_is_counted(slide: Path, tmp_path: Path, kind: str, codec: str) -> None:
    path = tmp_path / "a.tiff"
    path.write_bytes(slide.read_bytes())
    spoil(path, 23, kind)  # tile row 2, column 3
    with open_slide(path) as reader:
        tiling = tile_slide(reader, spec(codec=codec), 0.5)
        found = list(tiling.rows())
    assert tiling.bad_tiles == [(192, 128)]
    assert found == [row for row in rows(slide, codec=codec) if (row.x, row.y) != (192, 128)]


def test_one_flipped_bit_is_found_where_every_tile_is_decoded(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", RGB, tile=64, subsampling="420", shared=True)
    offset, length = tile_span(path, 0, 23)
    data = bytearray(path.read_bytes()[offset : offset + length])
    found = set()
    for place in range(data.index(b"\xff\xda") + 20, length - 2):
        changed = bytes(data[:place]) + bytes([data[place] ^ 16]) + bytes(data[place + 1 :])
        overwrite(path, offset, changed)
        with open_slide(path) as reader:
            tiling = tile_slide(reader, spec(codec="checked"), 0.5)
            list(tiling.rows(2 * 9, 3 * 9))
        if tiling.bad_tiles:
            found.add(place)
            break
    assert found  # libjpeg takes many flips for other pictures; those it complains of are lost


def test_too_many_bad_tiles(slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    path.write_bytes(slide.read_bytes())
    for number in (11, 12, 13, 14):
        spoil(path, number, "cut short")
    with pytest.raises(SlideError, match=r"4 of 63 patches .* tiling.max_bad_tiles=0.05") as caught:
        rows(path, max_bad_tiles=0.05)
    assert caught.value.reason == "bad-tiles"


def test_the_codecs_fingerprint_tells_code_libraries_and_builds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = cutting.codec_fingerprint.__wrapped__
    same = fingerprint()
    assert same == fingerprint() == cutting.codec_fingerprint()
    found = {same}
    with monkeypatch.context() as patch:
        patch.setattr(cutting, "PAYLOAD", cutting.PAYLOAD + 1)
        found.add(fingerprint())
    with monkeypatch.context() as patch:
        patch.setattr(cutting, "tool_versions", lambda: {"simplejpeg": "0"})
        found.add(fingerprint())
    original = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data: original(data, fastupsample=True))
    found.add(fingerprint())
    assert len(found) == 4
