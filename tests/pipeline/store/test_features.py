"""The feature store: exact vectors, the patch store's index and commit."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StorageError
from pipeline.schema import INDEX
from pipeline.store import features as features_module
from pipeline.store.features import FeatureStore, stored_slides
from pipeline.store.patches import PatchStore, StoredSlide
from pipeline.store.verify import verify_store
from tests.pipeline.small import small_config, store_slides, write_cohort

DIM = 7


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredSlide:
    folder = tmp_path_factory.mktemp("features")
    ((_, slide),) = store_slides(write_cohort(folder, ["no"]), folder / "store", small_config())
    return slide


def vectors(n: int, dtype: str = "float16") -> np.ndarray:
    return np.random.default_rng(1).normal(size=(n, DIM)).astype(dtype)


def chunks(whole: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (whole[start : start + size] for start in range(0, len(whole), size))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_any_rows_come_back_exactly(stored: StoredSlide, tmp_path: Path, dtype: str) -> None:
    whole = vectors(stored.n_patches, dtype)
    store = FeatureStore(str(tmp_path), "spec", "encoder")
    slide = store.write(stored, chunks(whole, 5), {"name": "x"})
    assert (slide.dim, slide.dtype) == (DIM, dtype)
    rows = np.array([3, 0, stored.n_patches - 1, 3])
    assert slide.vectors(rows).dtype == dtype
    assert (slide.vectors(rows) == whole[rows]).all()
    assert (pickle.loads(pickle.dumps(slide)).vectors(np.arange(len(whole))) == whole).all()
    assert (slide.positions(np.arange(slide.n_patches)) == stored.positions(np.arange(slide.n_patches))).all()
    assert slide.payloads(rows) == stored.payloads(rows)
    assert slide.key != stored.key


def test_parts_and_chunks_do_not_show(stored: StoredSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = vectors(stored.n_patches)
    one = FeatureStore(str(tmp_path / "one"), "spec", "encoder").write(stored, [whole], {})
    monkeypatch.setattr(features_module, "PART_BYTES", 4 * DIM * 2 + 1)  # four rows a part
    written = []
    for size in (1, 3, 11):
        many = FeatureStore(str(tmp_path / str(size)), "spec", "encoder").write(stored, chunks(whole, size), {})
        assert (many.vectors(np.arange(len(whole))) == one.vectors(np.arange(len(whole)))).all()
        written.append({p.name: p.read_bytes() for p in Path(many.uri).iterdir()})
    assert written[0] == written[1] == written[2]
    assert sum(name.endswith(".arrow") for name in written[0]) == -(-len(whole) // 4)


def test_arrow_and_parquet_read_them(stored: StoredSlide, tmp_path: Path) -> None:
    whole = vectors(stored.n_patches)
    slide = FeatureStore(str(tmp_path), "spec", "encoder").write(stored, [whole], {})
    (part,) = Path(slide.uri).glob("part-00000-*.arrow")
    assert part.stem.endswith(hashlib.sha256(part.read_bytes()).hexdigest()[:12])
    table = pa.ipc.open_file(part.read_bytes()).read_all()
    assert table.schema.field("feature").type == pa.list_(pa.float16(), DIM)
    assert (np.stack(table["feature"].to_numpy()) == whole).all()
    index = pq.read_table(Path(slide.uri, "index.parquet"))
    assert index.schema.equals(INDEX)
    assert set(index["length"].to_pylist()) == {2 * DIM}


@pytest.mark.parametrize("killed", [True, False])
def test_features_of_two_writers_are_those_of_the_first(
    stored: StoredSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, killed: bool
) -> None:
    """Devices differ in the last bits. The second writer begins first, and is killed or ends after the commit."""
    monkeypatch.setattr(features_module, "PART_BYTES", 4 * DIM * 2)  # four rows a part
    store, whole = FeatureStore(str(tmp_path), "0" * 16, "1" * 16), vectors(stored.n_patches)

    def second() -> Iterator[np.ndarray]:
        for number, chunk in enumerate(chunks(whole + np.float16(1), 4)):
            if number == 1:
                store.write(stored, chunks(whole, 4), {"name": "first"})
            if number == 3 and killed:
                raise KeyboardInterrupt
            yield chunk

    with pytest.raises(KeyboardInterrupt) if killed else nullcontext():
        store.write(stored, second(), {"name": "second"})
    store.append(store.rows(stored.key))
    (slide,) = store.slides([stored])
    assert (slide.vectors(np.arange(len(whole))) == whole).all()
    report = verify_store(str(tmp_path), 1, lambda _done, _all: None)
    assert report.damage == []
    assert {finding.what for finding in report.leftovers} == {"a file that the commit does not name"}


def test_nothing_is_there_before_the_commit(stored: StoredSlide, tmp_path: Path) -> None:
    store = FeatureStore(str(tmp_path), "spec", "encoder")
    assert not store.has(stored.key)
    with pytest.raises(StorageError, match="run the embed stage"):
        store.slides([stored])
    with pytest.raises(StorageError, match=f"1 of {stored.n_patches} patches gave features"):
        store.write(stored, [vectors(1)], {})
    assert not store.has(stored.key)


def test_features_of_other_patches_are_refused(stored: StoredSlide, tmp_path: Path) -> None:
    store = FeatureStore(str(tmp_path), "spec", "encoder")
    store.write(stored, [vectors(stored.n_patches)], {})
    assert not store.has(stored.key)
    store.append(store.rows(stored.key))
    anew = replace(stored, n_patches=stored.n_patches - 1)
    with pytest.raises(StorageError, match=f"features of {stored.n_patches} patches.*remove the folder"):
        store.slides([anew])


def test_features_made_anew_stand_for_those_that_are_gone(stored: StoredSlide, tmp_path: Path) -> None:
    """Whichever row of the catalogue has the lower id."""
    for number in range(6):
        store = FeatureStore(str(tmp_path / str(number)), "spec", "encoder")
        store.write(replace(stored), [vectors(stored.n_patches)], {})
        store.append(store.rows(stored.key))
        facts = Path(store.uri, stored.key, "slide.json")
        said = facts.read_text().replace(f'"n_patches": {stored.n_patches}', '"n_patches": 1')
        shutil.rmtree(facts.parent)
        store.forget_gone()
        facts.parent.mkdir()
        facts.write_text(said)
        store.append(store.rows(stored.key))
        assert [slide.n_patches for slide in store.slides([replace(stored, n_patches=1)])] == [1]


def test_largest_slides_first_each_once(tmp_path: Path) -> None:
    config = small_config()
    pairs = store_slides(write_cohort(tmp_path, ["no", "yes", "no"]), tmp_path / "store", config)
    keys = [stored.key for _, stored in pairs]
    found = stored_slides(PatchStore(str(tmp_path / "store"), config.tiling.fingerprint()), [*keys, keys[0]])
    assert sorted(slide.key for slide in found) == sorted(keys)
    assert [slide.n_patches for slide in found] == sorted((s.n_patches for _, s in pairs), reverse=True)
