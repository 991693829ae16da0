"""What lies around a patch: the same place, coarser, concentric, background beyond the slide, and no byte elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import simplejpeg
from hypothesis import strategies as st
from PIL import Image

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.slides.open import open_slide
from pipeline.tiling.cutting import Surroundings, encode, split
from pipeline.tiling.slide import PatchRow, SlideTiling, tile_slide
from tests.pipeline.tiled import open_plan, row
from tests.synth import tissue_rgb, write_pyramid, zero_tile

RGB = tissue_rgb(613, 487)
PATCH = 64


def spec(**fields: object) -> TilingConfig:
    return TilingConfig.model_validate({"patch_px": PATCH, "tissue": "none", "max_bad_tiles": 0.5, **fields})


def tiled(path: Path, **fields: object) -> tuple[SlideTiling, list[PatchRow]]:
    with open_slide(path) as reader:
        tiling = tile_slide(reader, spec(**fields), 0.5)
        return tiling, list(tiling.rows())


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 0.5, 1 and 2 microns a px, in tiles of a patch's size."""
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tiff", RGB, tile=PATCH, subsampling="420", levels=3)


def around(level: np.ndarray, downsample: float, x: float, y: float, edge: float, extent: float) -> np.ndarray:
    """Slowly: a square of `extent` level-0 px with the centre of a patch, from a level laid on endless glass."""
    size = round(extent / downsample)
    left, top = (round((at + edge / 2) / downsample - size / 2) for at in (x, y))
    endless = np.pad(level, ((2000, 2000), (2000, 2000), (0, 0)), constant_values=255)
    place = endless[top + 2000 : top + 2000 + size, left + 2000 : left + 2000 + size]
    return np.asarray(Image.fromarray(place).resize((PATCH, PATCH), Image.Resampling.BOX))


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"context_mpp": 2.0}, 2),  # level 2 as it is
        ({"context_mpp": 1.0, "edge": "pad"}, 1),
        ({"context_mpp": 2.6}, 2),  # level 2, resized
        ({"mpp": 0.7, "context_mpp": 1.6, "overlap_px": 9}, 1),  # patches resized too
        ({"context_mpp": 8.0}, 2),  # wider than the slide
    ],
)
def test_it_is_what_stands_there(slide: Path, fields: dict[str, float], number: int) -> None:
    tiling, rows = tiled(slide, **fields)
    with open_slide(slide) as reader:
        sizes = [(level.width, level.height, level.downsample) for level in reader.levels]
        level = reader.read(number, 0, 0, *sizes[number][:2])
        chosen = Surroundings.of(reader, tiling.grid, spec(**fields))
    assert chosen is not None
    assert chosen.level == number
    times = fields["context_mpp"] / fields.get("mpp", 0.5)
    seen = set()
    for one in rows:
        found = simplejpeg.decode_jpeg(split(one.image)[1]).astype(int)
        extent = tiling.grid.extent * times
        wanted = around(level, sizes[number][2], one.x, one.y, tiling.grid.extent, extent)
        assert np.abs(found - wanted).mean() < 3
        beyond = one.x + tiling.grid.extent / 2 - extent / 2 < 0, one.y + tiling.grid.extent / 2 - extent / 2 < 0
        seen.add(beyond)
    assert len(seen) > 1 or times == 16


def test_the_patch_itself_keeps_its_bytes(slide: Path) -> None:
    for fields in ({}, {"codec": "encoded"}, {"overlap_px": 5}):
        plain, both = tiled(slide, **fields)[1], tiled(slide, **fields, context_mpp=2.0)[1]
        assert [split(one.image)[0] for one in both] == [one.image for one in plain]
        assert [(one.cell, one.x, one.y) for one in both] == [(one.cell, one.x, one.y) for one in plain]
        assert np.array_equal(simplejpeg.decode_jpeg(both[7].image), simplejpeg.decode_jpeg(plain[7].image))


def test_without_it_stores_keep_their_keys() -> None:
    assert TilingConfig().fingerprint() == "a636d6c7da4082a4"
    assert "context_mpp" not in TilingConfig().identity()
    assert TilingConfig(context_mpp=2.0).fingerprint() != TilingConfig(context_mpp=4.0).fingerprint()


def test_many_patches_are_cut_some_at_a_time(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiled(slide, context_mpp=2.0)[1]
    monkeypatch.setattr("pipeline.tiling.cutting.AHEAD_PX", 7 * PATCH**2)
    assert tiled(slide, context_mpp=2.0)[1] == whole


def test_what_cannot_be_seen_costs_the_patch(slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    path.write_bytes(slide.read_bytes())
    zero_tile(path, 2, 0)  # of 64 px: level-0 px 0 to 256
    tiling, rows = tiled(path, context_mpp=2.0)
    lost = {(x, y) for x, y in tiling.bad_tiles}
    assert lost == {(x, y) for x in range(0, 353, 64) for y in range(0, 353, 64)}
    assert all(max(one.x, one.y) > 352 for one in rows)
    assert not tiled(path)[0].bad_tiles
    with pytest.raises(SlideError, match="patches cannot be decoded"):
        tiled(path, context_mpp=2.0, max_bad_tiles=0.1)


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(st.integers(8, 300), st.integers(50, 100), st.integers(0, 9), st.binary(max_size=40))
def test_the_second_picture_is_found(edge: int, quality: int, seed: int, behind: bytes) -> None:
    """Also where the patch is a tile of the slide that brings a thumbnail, or bytes behind its end."""
    pixels = np.random.default_rng(seed).integers(0, 256, (edge, edge, 3)).astype(np.uint8)
    second, own, small = encode(pixels, quality), encode(pixels[::-1], quality), encode(pixels[:8, :8], quality)
    first = own[:2] + b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small + own[2:] + behind
    assert np.array_equal(simplejpeg.decode_jpeg(first + second), simplejpeg.decode_jpeg(own))
    assert split(first + second) == (first, second)


def test_where_there_is_none_it_is_said() -> None:
    with pytest.raises(ValueError, match="no second picture"):
        split(encode(RGB[:64, :64], 90))


def test_streamed_it_has_the_bytes_of_the_store(slide: Path, tmp_path: Path) -> None:
    from pipeline.ingest.tiler import begin_slide, store_slide
    from pipeline.store.patches import PatchStore

    asked, one = spec(context_mpp=2.0), row(slide)
    stored = PatchStore(str(tmp_path / "store"), asked.fingerprint())
    status = store_slide(one, asked, str(tmp_path / "store"))
    begin_slide(one, asked, str(tmp_path / "plans"), whole=True, pixels=False)
    plans = PatchStore(str(tmp_path / "plans"), asked.fingerprint())
    streamed, kept = open_plan(one, asked, plans, status.key), stored.slide(str(status.key))
    rows = np.arange(kept.n_patches)
    assert streamed.payloads(rows) == kept.payloads(rows)
    assert streamed.context_mpp == kept.context_mpp == 2.0
    digests = {hashlib.sha256(split(data)[1]).hexdigest() for data in kept.payloads(rows)}
    assert len(digests) == kept.n_patches
