"""A small slide read for a pack: the patches that a folder of its own would hold, and little beside them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.schema import PATCHES
from pipeline.slides.identity import slide_digest
from pipeline.slides.open import open_slide
from pipeline.storage import files
from pipeline.store.packs import SmallSlide, write_pack
from pipeline.store.patches import PatchStore, StoredSlide
from pipeline.store.rows import slide_row
from pipeline.store.small import KEPT_SHARE, SMALL_PX, is_small, plan_small, read_small
from pipeline.tiling.evidence import read_mask_png
from pipeline.tiling.slide import tile_slide
from tests.pipeline.tiled import RGB, SPEC, row
from tests.synth import write_pyramid, zero_tile


def read(path: Path, *, pixels: bool = True, spec: TilingConfig = SPEC) -> SmallSlide:
    with open_slide(path) as reader:
        tiling = tile_slide(reader, spec, 0.5)
        assert is_small(reader, tiling)
        slide = slide_digest(str(path)).sha256, 0.5, reader, tiling, None
        return read_small(*slide) if pixels else plan_small(*slide, path.stat().st_size, distrusted=False)


def committed(folder: Path, small: SmallSlide) -> tuple[StoredSlide, PatchStore]:
    """The slide, packed and committed."""
    store, pack = PatchStore(str(folder), SPEC.fingerprint()), write_pack([small])
    files.write_bytes(files.join(store.uri, "packs", pack.name), pack.data)
    store.append([slide_row(small.facts, pack.name, pack.places[small.key].json())])
    return store.slide(small.key), store


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tiff", RGB, levels=2)


def test_it_has_what_a_folder_has(slide: Path, tmp_path: Path) -> None:
    from pipeline.ingest.tiler import store_slide

    status = store_slide(row(slide), SPEC, str(tmp_path / "folders"))
    store = PatchStore(str(tmp_path / "folders"), SPEC.fingerprint())
    folder = store.slide(str(status.key))
    packed, packs = committed(tmp_path / "packs", read(slide))
    assert packed.key == folder.key
    rows = np.arange(folder.n_patches)
    assert packed.payloads(rows) == folder.payloads(rows)
    assert packed.payloads(rows[::-3]) == folder.payloads(rows[::-3])
    assert (packed.positions(rows) == folder.positions(rows)).all()
    mine, theirs = packed.index_table().to_pydict(), folder.index_table().to_pydict()
    assert {name: mine[name] for name in ("row", "cell", "x", "y", "level", "length")} == {
        name: theirs[name] for name in ("row", "cell", "x", "y", "level", "length")
    }
    facts, known = packs.facts(packed.key), store.facts(folder.key)
    left_out = {"parts", "index", "files", "evidence", "thumbnail"}
    assert {name: value for name, value in known.items() if name not in left_out} == {
        name: value for name, value in facts.items() if name not in left_out
    }
    assert facts["evidence"]["mask"] == known["evidence"]["mask"]
    for name in ("dimensions", "extent", "thumbnail_scale", "stride", "mpp", "n_bad_tiles"):
        assert getattr(packed, name) == getattr(folder, name)


def test_pictures_are_small_and_show_the_slide(slide: Path, tmp_path: Path) -> None:
    small = read(slide)
    kept = len(small.overview) + len(small.mask)
    assert kept <= 1.5 * small.bytes / KEPT_SHARE
    packed, _ = committed(tmp_path, small)
    with open_slide(slide) as reader:
        tiling = tile_slide(reader, SPEC, 0.5)
        thumbnail, mask = tiling.thumbnail.rgb, tiling.mask()[0]
    shown = np.asarray(Image.open(io.BytesIO(packed.thumbnail())))
    assert shown.shape == thumbnail.shape
    assert np.abs(shown.astype(int) - thumbnail).mean() < 8
    assert read_mask_png(packed.mask()).mean() == pytest.approx(mask.mean(), abs=0.05)
    outline = json.loads(packed.outline())
    assert outline["features"]


def test_a_plan_knows_where_the_patches_are(slide: Path, tmp_path: Path) -> None:
    stored, plan = read(slide), read(slide, pixels=False)
    assert plan.patches.column("image").to_pylist() == [b""] * len(stored.patches)
    assert plan.patches.schema == PATCHES
    for name in ("cell", "x", "y", "level"):
        assert plan.patches.column(name) == stored.patches.column(name)
    planned, _ = committed(tmp_path, plan)
    assert planned.origins().shape == (len(stored.patches), 2)
    assert len(plan.overview) <= slide.stat().st_size / KEPT_SHARE


def test_lost_patches_are_counted(slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    path.write_bytes(slide.read_bytes())
    zero_tile(path, 0, 1)
    spec = TilingConfig(**{**SPEC.model_dump(), "max_bad_tiles": 1.0})
    small = read(path, spec=spec)
    assert small.facts["n_bad_tiles"] == small.facts["rejects"]["bad-tile"] == len(small.facts["bad_tiles"]) > 0
    assert small.facts["n_patches"] == len(small.patches)
    with pytest.raises(SlideError, match="max_bad_tiles"):
        read(path, spec=TilingConfig(**{**SPEC.model_dump(), "max_bad_tiles": 0.0}))


def test_large_slides_have_folders(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(slide) as reader:
        tiling = tile_slide(reader, SPEC, 0.5)
        monkeypatch.setattr("pipeline.store.small.SMALL_PX", len(tiling.cells) * 64**2 - 1)
        assert not is_small(reader, tiling)
    assert SMALL_PX == 256 * 256**2
