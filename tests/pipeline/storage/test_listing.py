"""Versions of many files: those that each file gives alone, in few requests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StorageError
from pipeline.storage import files, listing, s3
from pipeline.storage.listing import ask_all, folder_names
from pipeline.telemetry import drain
from tests.s3 import serve_s3

NAMES = ["a.svs", "a b.svs", "ä/x y.tiff", "deep/er/one.svs", "deep/er/two.svs", "z~", "z~~", "+%41&.png"]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of the client by name."""
    counted: Counter[str] = Counter()
    call = s3.call

    def counting(uri: str, method: str, *arguments: Any, **options: Any) -> Any:
        counted[str(arguments[0]) if method == "call_s3" else method] += 1
        return call(uri, method, *arguments, **options)

    monkeypatch.setattr(s3, "call", counting)
    return counted


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serve_s3(tmp_path / "s3") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        uri = server.bucket("slides")
        for number, name in enumerate(NAMES):
            path = tmp_path / "s3" / "slides" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(number + 1))
        yield uri


def test_pages_are_counted_by_their_own_name(bucket: str) -> None:
    drain()
    ask_all([f"{bucket}/{name}" for name in NAMES])
    assert drain() == {"requests.list_objects_v2": 1}
    folder_names(bucket)
    assert drain() == {"requests.list_objects_v2": 16}  # one a hexadecimal digit


def said(ask: listing.Ask, uri: str) -> object:
    try:
        return ask(uri)
    except StorageError as error:
        return str(error), type(error.__cause__)


@pytest.mark.parametrize("page", [1, 2, 3, 1000])
def test_versions_by_pages_are_those_of_each_file(
    page: int, bucket: str, requests: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "PAGE", page)
    monkeypatch.setattr(listing, "FEW", 1)
    uris = [f"{bucket}/{name}" for name in [*NAMES, "none", "deep", "deep/er", "zz"]]
    alone = [said(files.source_version, uri) for uri in uris]
    requests.clear()
    ask = ask_all(uris)
    asked = requests["list_objects_v2"]
    assert asked <= (1 if page == 1000 else len(uris))
    assert requests["info"] <= len(uris) - len(NAMES) if page == 1000 else True
    requests.clear()
    assert [said(ask, uri) for uri in uris] == alone
    assert not requests


def test_many_absent_files_cost_no_request_each(
    bucket: str, requests: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "TOLD", 5)
    uris = [f"{bucket}/none/{number}" for number in range(40)]
    ask = ask_all(uris)
    assert sum(requests.values()) == 1
    assert said(ask, uris[7]) == said(files.source_version, uris[7])


def test_files_far_apart_are_asked_side_by_side(
    bucket: str, tmp_path: Path, requests: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "PAGE", 3)
    monkeypatch.setattr(listing, "THREADS", 1)
    monkeypatch.setattr(listing, "FEW", 2)
    (tmp_path / "s3" / "slides" / "far").mkdir()
    for number in range(120):
        (tmp_path / "s3" / "slides" / "far" / f"{number:03d}").write_bytes(b"x" * (number + 1))
    uris = [f"{bucket}/far/{number:03d}" for number in range(0, 120, 4)]
    ask = ask_all(uris)
    assert requests["list_objects_v2"] <= 5  # after 1 file, 2, 4, 8 and 16 that are asked alone
    assert requests["list_objects_v2"] + requests["info"] <= len(uris) + 1
    assert [ask(uri).size for uri in uris] == list(range(1, 121, 4))
    assert ask_all(uris[:1])(uris[0]).size == 1


def test_a_name_that_the_server_refuses_costs_the_others_nothing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PATIENCE_S", 0.0)
    uris = [f"{bucket}/\0", f"{bucket}/{NAMES[0]}", f"{bucket}/{NAMES[1]}"]
    alone = [said(files.source_version, uri) for uri in uris]
    ask = ask_all(uris)
    assert [said(ask, uri) for uri in uris] == alone


def test_a_server_that_lists_in_no_order_is_not_believed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = listing._page

    def shuffled(uri: str, **options: Any) -> Any:
        found = page(uri, **options)
        return {"Contents": found["Contents"][:0:-1], "IsTruncated": True}

    monkeypatch.setattr(listing, "_page", shuffled)
    monkeypatch.setattr(listing, "TOLD", 0)
    uris = [f"{bucket}/{name}" for name in [*NAMES, "none"]]
    ask = ask_all(uris)
    assert [said(ask, uri) for uri in uris] == [said(files.source_version, uri) for uri in uris]


def test_a_bucket_that_is_not_there_is_named_for_each_file(bucket: str) -> None:
    uris = ["s3://nowhere/a", f"{bucket}/{NAMES[0]}", "s3://nowhere/b"]
    ask = ask_all(uris)
    assert ask(uris[1]).size == 1
    for uri in (uris[0], uris[2]):
        with pytest.raises(StorageError, match="bucket nowhere does not exist") as caught:
            ask(uri)
        assert uri in str(caught.value)


def test_local_files_are_asked_when_they_are_wanted(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    os.utime(path, (1, 2))
    assert ask_all([str(path)])(str(path)) == files.SourceVersion(3, None, 2.0)
    with pytest.raises(StorageError, match="it does not exist"):
        ask_all([])(str(tmp_path / "none"))


def test_names_of_folders(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("0a", "f0", "f1/deep", "e9"):
        path = tmp_path / "s3" / "slides" / "store" / name / "slide.json"
        path.parent.mkdir(parents=True)
        path.touch()
    assert folder_names(f"{bucket}/store") == {"0a", "f0", "f1", "e9"}
    assert folder_names(str(tmp_path / "s3" / "slides" / "store")) == {"0a", "f0", "f1", "e9"}
    assert folder_names(f"{bucket}/nothing") == folder_names(str(tmp_path / "nothing")) == frozenset()
