from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage import files
from pipeline.store import shelf as module
from pipeline.store.shelf import Shelf
from tests.pipeline.store.test_catalogue import slide
from tests.s3 import serve_s3

KEYS = ["a" * 32, "0" * 32, "f" * 32]


def fill(uri: str) -> Shelf:
    """Three slides with folders, one of them gone, two in packs, one of those gone, and a folder not committed."""
    for key in (*KEYS[:2], "b" * 32):
        files.write_json(files.join(uri, key, "slide.json"), {"key": key})
    files.write_bytes(files.join(uri, "packs", "pack-1.arrow"), b"")
    shelf = Shelf(uri)
    packed = [{**slide(key), "pack": f"pack-{number}.arrow"} for number, key in enumerate(("lost", "packed"))]
    shelf.append([*(slide(key) for key in KEYS), *packed])
    return shelf


@pytest.mark.parametrize(("remote", "few"), [(0, 16), (1, 16), (1, 0)])
def test_what_is_committed_and_there(remote: int, few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW", few)
    with serve_s3(tmp_path / "s3") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.bucket("store")
        shelf = fill("s3://store/spec" if remote else str(tmp_path / "s3" / "store" / "spec"))
        asked = [KEYS[2], "packed", "lost", "b" * 32, KEYS[0], "never"]
        assert shelf.gone(asked) == [KEYS[2], "lost", "b" * 32, "never"]
        assert (shelf.has(KEYS[1]), shelf.has("b" * 32)) == (True, False)
        assert shelf.commit_of("b" * 32) == {"key": "b" * 32}
        assert shelf.commit_of(KEYS[2]) is None
        assert dict(shelf.all_facts([KEYS[0], "b" * 32])) == {KEYS[0]: {"a": 1}}
        shelf.forget_gone()
        assert shelf.view.slides["key"].to_pylist() == sorted([KEYS[1], KEYS[0], "packed"])


def test_what_others_commit_meanwhile_is_found_where_it_is_required(tmp_path: Path) -> None:
    shelf = fill(str(tmp_path / "spec"))
    shelf.require(KEYS[:2], "no slide")
    other = Shelf(str(tmp_path / "spec"))
    other.append([slide("b" * 32)])
    assert not shelf.has("b" * 32)
    shelf.require(["b" * 32], "no slide")
    shutil.rmtree(tmp_path / "spec" / KEYS[0])
    with pytest.raises(StorageError, match=f"{KEYS[0]}: no slide"):
        shelf.require(KEYS[:1], "no slide")
