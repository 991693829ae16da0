"""Sharpness through the tile stage: kept beside the patches where it is asked for, and nowhere else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from scipy import ndimage

from pipeline.datasets.opened import open_store
from pipeline.errors import BadTileError
from pipeline.ingest.tiler import begin_slide, store_slide
from pipeline.schema import INDEX, MEASURED
from pipeline.slides.open import open_slide
from pipeline.store.patches import PLANS, PatchStore, StoredSlide
from pipeline.store.verify import verify_store
from pipeline.tiling.sharpness import histogram
from tests.oracle import sharpness_by_px
from tests.pipeline.tiled import RGB, SPEC, contents, open_plan, row, sampled_digests, small_tasks, tile_in_shares
from tests.synth import tile_span, write_pyramid, zero_tile

MEASURE = SPEC.model_copy(update={"min_sharpness": 0.0, "tissue": "none", "max_bad_tiles": 0.9})


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its right half is out of focus, and one tile is lost."""
    rgb = RGB.copy()
    rgb[:, 300:] = np.rint(ndimage.gaussian_filter(rgb[:, 300:].astype(float), (2, 2, 0))).astype(np.uint8)
    path = write_pyramid(tmp_path_factory.mktemp("slides") / "half.tiff", rgb, levels=2)
    zero_tile(path, 0, 1)
    return path


def stored(path: Path, store: Path, **fields: float | None) -> tuple[StoredSlide, PatchStore]:
    spec = MEASURE.model_copy(update=fields)
    status = store_slide(row(path), spec, str(store))
    patches = PatchStore(str(store), spec.fingerprint())
    return patches.slide(str(status.key)), patches


def test_the_index_has_what_each_patch_measures(slide: Path, tmp_path: Path) -> None:
    measured, store = stored(slide, tmp_path)
    table = pq.read_table(Path(measured.uri) / "index.parquet")
    assert table.schema.equals(MEASURED)
    values = table["sharpness"].to_numpy()
    for image, value in list(zip(measured.payloads(range(measured.n_patches)), values, strict=True))[::9]:
        assert value == np.float32(float(sharpness_by_px(simplejpeg.decode_jpeg(image))))
    facts = store.facts(measured.key)
    known = facts["sharpness"]
    assert known["median"] == pytest.approx(np.median(values), abs=1e-3)
    assert known["kept"] == np.trim_zeros(histogram(values), "b").tolist()
    assert known["least"] == [[int(at), pytest.approx(values[at], abs=1e-3)] for at in np.argsort(values)[:6]]
    assert (facts["rejects"]["blurred"], known["blurred"]) == (0, [])
    assert verify_store(str(tmp_path), 1, lambda *_: None).damage == []

    plain, _ = stored(slide, tmp_path, min_sharpness=None)
    assert pq.read_table(Path(plain.uri) / "index.parquet").schema.equals(INDEX)
    assert plain.key == measured.key
    rows = range(plain.n_patches)
    assert plain.payloads(rows) == measured.payloads(rows)
    assert (
        plain.index_table()
        .select(["row", "cell", "x", "y"])
        .equals(measured.index_table().select(["row", "cell", "x", "y"]))
    )
    opened = open_store(str(Path(measured.uri).parent))
    assert len(opened[measured.key].read([0])) == 1


def test_a_threshold_leaves_out_the_same_patches_whoever_reads_them(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task, the shares of a large slide, and a plan of which no patch is stored."""
    everything, _ = stored(slide, tmp_path / "measured")
    table = pq.read_table(Path(everything.uri) / "index.parquet")
    limit = float(np.median(table["sharpness"].to_numpy()))
    sharp = table.filter(table["sharpness"].to_numpy() >= limit)
    spec = MEASURE.model_copy(update={"min_sharpness": limit})
    kept, store = stored(slide, tmp_path / "whole", min_sharpness=limit)
    index = pq.read_table(Path(kept.uri) / "index.parquet")
    assert index.select(["cell", "sharpness"]).equals(sharp.select(["cell", "sharpness"]))
    assert store.facts(kept.key)["rejects"] == {
        **everything_rejects(tmp_path / "measured", everything),
        "blurred": everything.n_patches - kept.n_patches,
    }
    assert kept.n_bad_tiles == everything.n_bad_tiles > 0

    begin_slide(row(slide), spec, str(tmp_path / PLANS), whole=True, pixels=False)
    plans = PatchStore(str(tmp_path / PLANS), spec.fingerprint())
    plan = open_plan(row(slide), spec, plans, kept.key)
    assert plan.payloads(range(plan.n_patches)) == kept.payloads(range(kept.n_patches))
    assert plans.facts(kept.key)["sharpness"] == store.facts(kept.key)["sharpness"]
    assert plans.facts(kept.key)["rejects"] == store.facts(kept.key)["rejects"]

    small_tasks(monkeypatch.setattr)
    one, shares = tmp_path / "one", tmp_path / "shares"
    store_slide(row(slide), spec, str(one))
    status = tile_in_shares(row(slide), str(shares), spec)
    assert status.n_patches == kept.n_patches
    assert len(PatchStore(str(shares), spec.fingerprint()).facts(kept.key)["parts"]) == part_count_of(everything)
    assert contents(one) == contents(shares)


def everything_rejects(folder: Path, slide: StoredSlide) -> dict[str, int]:
    rejects: dict[str, int] = dict(PatchStore(str(folder), MEASURE.fingerprint()).facts(slide.key)["rejects"])
    return rejects


def part_count_of(slide: StoredSlide) -> int:
    return -(-(slide.n_patches + slide.n_bad_tiles) // 9)


def test_a_slide_that_is_all_blurred_says_so(slide: Path, tmp_path: Path) -> None:
    spec = MEASURE.model_copy(update={"min_sharpness": 1e6})
    status = store_slide(row(slide), spec, str(tmp_path))
    assert status.status == "quarantined"
    assert str(status.reason).startswith("blurred: none of 63 patches has tiling.min_sharpness=1e+06")
    plan = begin_slide(row(slide), spec, str(tmp_path / PLANS), whole=True, pixels=False)
    assert getattr(plan, "reason", None) == status.reason


def test_a_renamed_copy_is_the_slide_where_measuring_alone_finds_the_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage within a tile's compressed data, which `codec: original` does not look at."""
    sampled_digests(monkeypatch.setattr)
    path = write_pyramid(tmp_path / "a.tiff", RGB, tile=64, levels=1)
    garble_tile(path, 22)
    copied = Path(shutil.copy(path, tmp_path / "b.tiff"))
    spec = MEASURE.model_copy(update={"codec": "original"})
    first, second = (store_slide(row(one), spec, str(tmp_path / "store")) for one in (path, copied))
    assert (first.status, first.n_bad_tiles) == ("committed", 1)
    assert (second.key, second.n_bad_tiles) == (first.key, 1)


def garble_tile(path: Path, number: int) -> None:
    """Overwrite px of a tile of 64 px so that it cannot be decoded, and looks as a JPEG does."""
    good, (offset, length) = path.read_bytes(), tile_span(path, 0, number)
    first = good.index(b"\xff\xda", offset) + 14
    for seed in range(300):
        garbled, rng = bytearray(good), np.random.default_rng(seed)
        at, count = int(rng.integers(first, offset + length - 60)), int(rng.integers(2, 40))
        garbled[at : at + count] = rng.integers(0, 255, count).astype(np.uint8).tobytes()
        path.write_bytes(garbled)
        with open_slide(path) as reader:
            try:
                reader.raw_tile(0, number % 10, number // 10)
                simplejpeg.decode_jpeg(bytes(garbled[offset : offset + length]))
            except BadTileError:
                continue
            except ValueError:
                return
    raise AssertionError("no such damage was found")
