from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.datasets.opened import open_store
from pipeline.errors import StorageError
from pipeline.store.catalogue import Catalogue
from tests.pipeline.datasets.made import as_written
from tests.s3 import serve_s3

REFUSED = {"kind": "source", "asked": "x", "uri": "u", "status": "quarantined"}


def test_a_store_is_opened_by_its_folder_or_the_only_specs(patches: Path, features: Path) -> None:
    store = open_store(str(patches.parent))
    assert (store.uri, store.kind, len(store)) == (str(patches), "patches", 3)
    assert open_store(str(features.parent)).kind == "features"
    assert [slide.key for slide in store] == sorted(as_written(patches)) == store.slides["key"].to_pylist()
    sources = {row["key"]: row["sources"] for row in store.slides.to_pylist()}
    assert sources[store["s1"].key] == [str(patches.parents[1] / "s1.png")]
    assert set(store.slides["n_patches"].to_pylist()) == {20}


def test_the_root_of_runs_means_its_patches(patches: Path, tmp_path: Path) -> None:
    shutil.copytree(patches.parent, tmp_path / "patches")
    for apart in ("plans", "given"):
        (tmp_path / "patches" / apart / patches.name).mkdir(parents=True)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "tile-1.json").write_text("{}")
    assert open_store(str(tmp_path)).uri == str(tmp_path / "patches" / patches.name)


def test_of_several_stores_one_has_to_be_named(patches: Path, tmp_path: Path) -> None:
    shutil.copytree(patches, tmp_path / patches.name)
    Catalogue(str(tmp_path / ("0" * 16))).append([REFUSED])
    with pytest.raises(StorageError, match=f"2 stores lie there.*\n.*{'0' * 16}: 0 slides\n.*{patches.name}: 3 slides"):
        open_store(str(tmp_path))
    with pytest.raises(StorageError, match="no patch store"):
        open_store(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["s2", "s2.png", "URI", "KEY", "PREFIX"])
def test_a_slide_is_found_by_any_of_its_names(patches: Path, name: str) -> None:
    store = open_store(str(patches))
    key, uri = store["s2"].key, store["s2"].sources[0]
    assert store[{"URI": uri, "KEY": key, "PREFIX": key[:6]}.get(name, name)].key == key


def test_a_name_of_none_or_of_several_is_refused(patches: Path) -> None:
    store = open_store(str(patches))
    with pytest.raises(StorageError, match="0 slides are called 's9'"):
        store["s9"]
    with pytest.raises(StorageError, match="3 slides are called ''"):
        store[""]


def test_a_sample_of_all_rows(patches: Path) -> None:
    store, written = open_store(str(patches)), as_written(patches)
    batch = store.sample(25, seed=1)
    assert len({*zip(batch.keys, batch.rows.tolist(), strict=True)}) == 25
    assert [written[key][row][:2] for key, row in zip(batch.keys, batch.rows.tolist(), strict=True)] == [
        *zip(batch.x.tolist(), batch.y.tolist(), strict=True)
    ]
    assert len(store.sample(1000)) == 60
    drawn = np.concatenate([store.sample(6, seed).rows + 20 * (np.array(store.sample(6, seed).keys) == store["s1"].key)
                            for seed in range(30)])  # fmt: skip
    assert len(set(drawn.tolist())) > 30


def test_pictures_of_a_slide(patches: Path, features: Path) -> None:
    for name in ("s0", "s2"):
        assert open_store(str(patches)).stored(name).thumbnail().startswith(b"\xff\xd8")
    with pytest.raises(StorageError, match="no pictures"):
        open_store(str(features)).stored("a")


def test_a_store_without_slides(tmp_path: Path) -> None:
    Catalogue(str(tmp_path / ("0" * 16))).append([REFUSED])
    store = open_store(str(tmp_path))
    assert (len(store), list(store), store.slides.num_rows) == (0, [], 0)
    with pytest.raises(StorageError, match="no rows"):
        store.sample(3)
    for opened in (store.ray, store.arrow):
        with pytest.raises(StorageError, match="slides"):
            opened()
    assert len(store.torch()) == 0


def test_html_says_what_is_there_and_escapes_names(patches: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<b>" / patches.name
    shutil.copytree(patches, folder)
    html = open_store(str(folder))._repr_html_()
    assert "3 slides, 60 patches" in html
    assert "s2.png" in html
    assert "<b>" not in html


def test_on_s3_as_on_a_disk(patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(tmp_path / "s3") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        shutil.copytree(patches, tmp_path / "s3" / "bucket" / patches.name)
        there, here = open_store("s3://bucket"), open_store(str(patches))
        assert np.array_equal(there.sample(9).data, here.sample(9).data)
        assert there.arrow().to_table().equals(here.arrow().to_table())
