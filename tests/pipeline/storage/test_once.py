from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage.files import read_bytes, read_json
from pipeline.storage.once import create_bytes, create_json
from tests.s3 import S3Server


def test_the_first_one_writes_and_the_others_know(tmp_path: Path) -> None:
    uri = str(tmp_path / "a" / "1.json")
    assert create_json(uri, {"b": 1, "a": 2})
    assert not create_json(uri, {"b": 2})
    assert create_json(uri, {"a": 2, "b": 1})  # as after an attempt whose answer was lost
    assert read_json(uri) == {"a": 2, "b": 1}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["1.json"]


def test_of_many_at_once_one_writes(tmp_path: Path) -> None:
    uri, texts = str(tmp_path / "1"), [str(n).encode() for n in range(16)]
    barrier = threading.Barrier(len(texts))

    def create(data: bytes) -> bool:
        barrier.wait()
        return create_bytes(uri, data)

    with ThreadPoolExecutor(len(texts)) as pool:
        won = [data for data, mine in zip(texts, pool.map(create, texts), strict=True) if mine]
    assert won == [read_bytes(uri)]


def test_on_a_disk_without_links_it_is_written_and_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(_from: str, to: str) -> None:
        Path(to).write_bytes(b"another one's")  # who was faster by a moment, and is overwritten
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    assert create_bytes(str(tmp_path / "1"), b"mine")
    assert not create_bytes(str(tmp_path / "1"), b"other")
    assert [path.name for path in tmp_path.iterdir()] == ["1"]

    def full(_from: str, _to: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(StorageError, match="cannot write .*2: the disk, or its quota, is full"):
        create_bytes(str(tmp_path / "2"), b"mine")


def test_on_a_server_that_knows_no_condition_too(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    uri = "s3://slides/once/1"
    assert create_bytes(uri, b"mine")
    assert not create_bytes(uri, b"other")
    assert read_bytes(uri) == b"mine"


def test_a_server_that_knows_the_condition_writes_over_nothing(strict: dict[str, bytes]) -> None:
    assert create_bytes("s3://b/new", b"mine")
    assert not create_bytes("s3://b/raced", b"mine")  # written between the look and the request
    assert strict == {"/b/new": b"mine", "/b/raced": b"another one's"}
    assert create_bytes("s3://b/refuses", b"mine")
    assert strict["/b/refuses"] == b"mine"


def test_what_is_created_whole_is_never_seen_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []

    def watch(source: str, target: str) -> None:
        seen.append(Path(source).read_bytes())
        Path(source).rename(target)
        Path(source).touch()

    monkeypatch.setattr(os, "link", watch)
    assert create_bytes(str(tmp_path / "1"), b"mine")
    assert seen == [b"mine"]
