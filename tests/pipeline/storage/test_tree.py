from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.storage import files
from pipeline.storage.tree import delete_folder, upload_tree, walk
from tests.s3 import S3Server


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return "s3://slides"


@pytest.mark.parametrize("remote", [0, 1])
def test_a_tree_is_walked_in_order_with_sizes_and_times_and_deleted(remote: int, bucket: str, tmp_path: Path) -> None:
    root = f"{bucket}/tree" if remote else str(tmp_path / "tree")
    before = time.time()
    for name, size in (("b/x y.bin", 3), ("a.bin", 5), ("b/.1.tmp", 2), ("b/ü/z.bin", 0)):
        files.write_bytes(files.join(root, name), bytes(size))
    found = list(walk(root))
    assert [(one.uri.removeprefix(root + "/"), one.size) for one in found] == [
        ("a.bin", 5),
        ("b/.1.tmp", 2),
        ("b/x y.bin", 3),
        ("b/ü/z.bin", 0),
    ]
    assert all(before - 2 < one.modified < time.time() + 2 for one in found)
    delete_folder(files.join(root, "b"))
    assert [one.uri for one in walk(root)] == [files.join(root, "a.bin")]
    assert list(walk(files.join(root, "none"))) == []


def test_times_are_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    os.utime(tmp_path / "a", (0, 1234.5))
    assert [one.modified for one in walk(str(tmp_path))] == [1234.5]


def test_a_tree_is_uploaded_whole(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "t" / "in").mkdir(parents=True)
    (tmp_path / "t" / "in" / "a").write_bytes(b"12")
    upload_tree(tmp_path / "t", f"{bucket}/up")
    assert files.read_bytes(f"{bucket}/up/in/a") == b"12"
