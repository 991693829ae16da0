"""Local files and a real S3 server behind the same calls."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage import files
from pipeline.storage.tree import delete_folder, upload_tree
from tests.s3 import S3Server, serve_s3

DATA = bytes(range(251)) * 7
NAME = "slide é, 50% [a]?#=.bin"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("bucket")
        yield server


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that does not exist yet, on each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "root")
    for name, value in request.getfixturevalue("server").env.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}"


def test_bytes_come_back(root: str) -> None:
    uri = files.join(root, "deep", NAME)
    assert not files.exists(uri)
    files.write_bytes(uri, b"first")
    files.write_bytes(uri, DATA)
    assert files.exists(uri)
    assert files.exists(files.join(root, "deep"))
    assert files.read_bytes(uri) == DATA
    assert files.list_names(root) == ["deep"]
    assert files.list_names(files.join(root, "deep") + "/") == [NAME]
    assert files.list_names(files.join(root, "nothing")) == []


def test_ranges_in_their_order(root: str) -> None:
    uri = files.join(root, NAME)
    files.write_bytes(uri, DATA)
    ranges = [(1700, 57), (0, 1), (9, 0), (250, 3), (250, 3)]
    assert files.read_ranges(uri, ranges) == [DATA[start : start + length] for start, length in ranges]
    for start in (1750, 9000):
        with pytest.raises(StorageError, match="truncated or was changed"):
            files.read_ranges(uri, [(0, 5), (start, 50)])


def test_versions_tell_states_apart(root: str) -> None:
    uri = files.join(root, NAME)
    files.write_bytes(uri, DATA)
    first = files.source_version(uri)
    assert first == files.source_version(uri)
    assert first.size == len(DATA)
    assert (first.etag is None) != (first.mtime is None)
    if first.mtime is not None:
        os.utime(uri, (1, 1))
    files.write_bytes(uri, DATA[::-1])
    assert files.source_version(uri) != first


def test_json_bytes_are_deterministic(root: str) -> None:
    first, second = files.join(root, "a.json"), files.join(root, "b.json")
    files.write_json(first, {"b": [1, None], "a": "é"})
    files.write_json(second, {"a": "é", "b": [1, None]})
    assert files.read_bytes(first) == files.read_bytes(second)
    assert files.read_json(first) == {"a": "é", "b": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(first, math.nan)
    files.write_bytes(first, b'{"a": ')
    with pytest.raises(StorageError, match=r"a\.json: not JSON"):
        files.read_json(first)


def test_trees_and_copies(root: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / NAME).write_bytes(DATA)
    (tree / "empty").touch()
    upload_tree(tree, files.join(root, "copy"))
    assert files.list_names(files.join(root, "copy")) == ["empty", "sub"]
    uri = files.join(root, "copy", "sub", NAME)
    files.download(uri, tmp_path / "new" / "here")
    assert (tmp_path / "new" / "here").read_bytes() == DATA
    with pytest.raises(StorageError, match="does not exist"):
        files.download(uri + "x", tmp_path / "new" / "gone")
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["here"]


def test_large_files_in_parts(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART_BYTES", 5 << 20)  # S3's smallest part
    data = os.urandom((11 << 20) + 7)  # above twice that, and not a multiple of it
    uri, path = files.join(root, "large"), tmp_path / "large"
    files.write_bytes(uri, data)
    assert files.source_version(uri).size == len(data)
    files.download(uri, path)
    assert path.read_bytes() == data
    files.upload(path, uri + "2")
    assert files.read_bytes(uri + "2") == data


def test_a_folder_goes_with_all_below_it(root: str) -> None:
    folder = files.join(root, "go ne")
    for name in ("a", "sub/b"):
        files.write_bytes(files.join(folder, name), DATA)
    files.write_bytes(folder + "-not", DATA)
    delete_folder(folder)
    delete_folder(folder)
    assert not files.exists(files.join(folder, "sub", "b"))
    assert files.list_names(folder) == []
    assert files.read_bytes(folder + "-not") == DATA


def test_what_vanishes_while_a_folder_is_listed_does_not_hide_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(DATA)
    real = os.scandir

    @contextmanager
    def scanned(path: Path) -> Iterator[list[os.DirEntry[str]]]:
        with real(path) as entries:
            found = list(entries)
        (tmp_path / "b").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", scanned)
    assert files.list_names(str(tmp_path)) == ["a", "c"]
    (tmp_path / "b").write_bytes(DATA)
    assert list(files.list_versions(str(tmp_path))) == ["a", "c"]


def test_a_broken_link_is_known_and_does_not_hide_the_rest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    (tmp_path / "good").symlink_to(tmp_path / "file")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    assert files.list_names(str(tmp_path)) == ["file", "good"]
    assert list(files.list_versions(str(tmp_path))) == ["file", "good"]
    assert files.without_file(str(tmp_path)) == ["broken"]
    assert files.without_file(str(tmp_path / "absent")) == []


def test_absent_and_folders(root: str) -> None:
    files.write_bytes(files.join(root, "folder", "file"), DATA)
    folder, absent = files.join(root, "folder"), files.join(root, "absent")
    for read in (files.source_version, files.read_bytes, lambda uri: files.read_ranges(uri, [(0, 1)])):
        with pytest.raises(StorageError, match="folder: it is a folder; name a file"):
            read(folder)
        with pytest.raises(StorageError, match="absent: it does not exist; check the spelling"):
            read(absent)


def test_uris() -> None:
    assert files.join("s3://b/p/", "a/", "c") == "s3://b/p/a/c"
    assert files.join("/", "a") == "/a"
    assert files.parent("s3://b/p/x y.csv") == "s3://b/p"
    assert files.parent("/x") == "/"
    assert files.absolute("a/../b") == f"{Path.cwd()}/b"
    assert files.absolute("~/b") == f"{Path.home()}/b"
    assert files.absolute("file:///a%20b/c?#d") == "/a b/c?#d"
    assert files.absolute("S3://b/p/") == "s3://b/p"
    assert files.is_remote("s3://b/p")
    assert not files.is_remote("/data/s3://b")
    for uri, reason in [("gcs://b/p", "gcs:// is not"), ("s3:///p", "no bucket"), ("file://host/p", "names the host")]:
        with pytest.raises(StorageError, match=reason):
            files.absolute(uri)


@pytest.mark.parametrize("act", [files.read_bytes, files.absolute, files.list_names, files.exists, files.delete])
@pytest.mark.parametrize("uri", ["s3://KEY:Pa55/w@b/k", "s3://b/k?X-Amz-Signature=Pa55", "https://u:a Pa55@h/k"])
def test_a_uri_with_a_credential_is_refused_and_not_repeated(act: Callable[[str], object], uri: str) -> None:
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY") as caught:
        act(uri)
    assert "Pa55" not in str(caught.value)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_bytes(str(path), DATA)
    with pytest.raises(TypeError):
        files.write_bytes(str(path), "text")  # type: ignore[arg-type]
    assert path.read_bytes() == DATA
    assert files.list_names(str(tmp_path)) == ["file"] == [entry.name for entry in tmp_path.iterdir()]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_readers_never_see_half_a_write(tmp_path: Path) -> None:
    uri, sizes = str(tmp_path / "file"), set()
    files.write_bytes(uri, b"")

    def write() -> None:
        for megabytes in (1, 0, 1, 0):
            files.write_bytes(uri, bytes(megabytes << 20))

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        sizes.add(len(files.read_bytes(uri)))
        assert [n for n in files.list_names(str(tmp_path)) if n != "file"] == []
    writer.join()
    assert sizes <= {0, 1 << 20}


def _read_after_fork(uri: str) -> bytes:
    return files.read_bytes(uri)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_gets_its_own_client(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    files.write_bytes("s3://bucket/fork", DATA)  # the parent's client and its thread are running now
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_read_after_fork, ("s3://bucket/fork",)).get(timeout=30) == DATA


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
