"""Google's and Azure's storage against servers that speak as they do, beside a folder as the twin.

Azure: azurite. Google: rclone's server of the XML interface that Google shares with S3, by a proxy that answers ranges
with 206 as HTTP has it. No emulator that can be had here knows Google's conditions (generations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.datasets.opened import open_store
from pipeline.errors import DamagedError, StorageError
from pipeline.storage import files, lease, objects
from pipeline.storage.cloud import ChangedError
from pipeline.storage.listing import ask_all, folder_names
from pipeline.storage.once import create_json
from pipeline.storage.s3 import PART_BYTES
from pipeline.storage.staging import Staging, fetch
from pipeline.storage.tree import delete_folder, upload_tree, walk
from pipeline.store.verify import verify_store
from tests.azure import serve_azure
from tests.faults import Faults, faulty_s3
from tests.pipeline.datasets.made import patch_store
from tests.pipeline.storage.claims import check_replaced_only_as_it_was_read, six_that_claim
from tests.s3 import serve_s3

AZURE = pytest.param("az", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["gs", AZURE])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Faults]]:
    """A bucket's URI, and the proxy before its server."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "gs":
            with serve_s3(folder, public=True) as google, faulty_s3(google.endpoint) as faults:
                google.bucket("bucket")
                patch.setenv("GOOGLE_BASE_URL", faults.endpoint)
                patch.setenv("GOOGLE_BEARER_TOKEN", "of-the-test")
                yield "gs://bucket", faults
        else:
            with serve_azure(folder) as azure:
                uri = azure.container("bucket")
                host, _, account = azure.endpoint.rpartition("/")
                with faulty_s3(host) as faults:
                    for name, value in azure.env.items():
                        patch.setenv(name, value)
                    patch.setenv("AZURE_STORAGE_ENDPOINT", f"{faults.endpoint}/{account}")
                    yield uri, faults


def test_files_are_as_in_a_folder(place: tuple[str, Faults], tmp_path: Path) -> None:
    for root in (f"{place[0]}/twin", str(tmp_path / "twin")):
        files.write_json(f"{root}/a/facts.json", {"ä": 1})
        files.write_bytes(f"{root}/a/empty", b"")
        files.write_bytes(f"{root}/a/b c/d+e%20#.bin", b"0123456789")
        files.write_bytes(f"{root}/a/facts.json", b'{"b": 2}')
        assert files.read_json(f"{root}/a/facts.json") == {"b": 2}
        assert files.list_names(f"{root}/a") == ["b c", "empty", "facts.json"]
        assert {n: v.size for n, v in files.list_versions(f"{root}/a").items()} == {"empty": 0, "facts.json": 8}
        assert files.read_ranges(f"{root}/a/b c/d+e%20#.bin", [(7, 3), (0, 0), (1, 2)]) == [b"789", b"", b"12"]
        assert [files.exists(f"{root}{name}") for name in ("", "/a", "/a/empty", "/no", "/a/emp")] == [1, 1, 1, 0, 0]
        assert files.source_version(f"{root}/a/empty").size == 0
        assert files.read_if_there(f"{root}/a/no") is None
        assert files.list_names(f"{root}/no") == []
        assert sorted((found.uri.removeprefix(root), found.size) for found in walk(root)) == [
            ("/a/b c/d+e%20#.bin", 10), ("/a/empty", 0), ("/a/facts.json", 8)
        ]  # fmt: skip
        files.delete(f"{root}/a/empty")
        files.delete(f"{root}/a/empty")
        delete_folder(f"{root}/a/b c")
        assert files.list_names(f"{root}/a") == ["facts.json"]


@pytest.mark.parametrize("size", [0, 1, PART_BYTES - 1, 2 * PART_BYTES + 7])
def test_copies_are_whole(place: tuple[str, Faults], tmp_path: Path, size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "in" / "x").mkdir(parents=True)
    (tmp_path / "in" / "x" / "file").write_bytes(data[:size])
    upload_tree(tmp_path / "in", f"{place[0]}/copies{size}")
    files.download(f"{place[0]}/copies{size}/x/file", tmp_path / "out" / "file")
    assert (tmp_path / "out" / "file").read_bytes() == data[:size] == fetch(f"{place[0]}/copies{size}/x/file").data
    with Staging(str(tmp_path / "node")).hold(
        f"{place[0]}/copies{size}/x/file", [f"{place[0]}/copies{size}/x/file"]
    ) as at:
        assert at.read_bytes() == data[:size]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 99_999), st.integers(0, 60_000)), max_size=9))
def test_any_ranges(place: tuple[str, Faults], wanted: list[tuple[int, int]]) -> None:
    uri, data = f"{place[0]}/ranges", bytes(range(256)) * 391
    if not files.exists(uri):
        files.write_bytes(uri, data)
    inside = [(start, min(length, len(data) - start)) for start, length in wanted]
    assert files.read_ranges(uri, inside) == [data[start : start + length] for start, length in inside]


def test_errors_name_what_is_wrong(place: tuple[str, Faults], tmp_path: Path) -> None:
    root = f"{place[0]}/errors"
    files.write_bytes(f"{root}/folder/file", b"0123")
    for uri, told in (
        (f"{root}/nope", "does not exist; check the spelling"),
        (f"{root}/folder", "is a folder; name a file"),
    ):
        for use in (files.read_bytes, files.source_version, lambda at: files.download(at, tmp_path / "x")):
            with pytest.raises(StorageError, match=f"cannot read {uri}: it {told}"):
                use(uri)
    with pytest.raises(DamagedError, match="ends at byte 4"):
        files.read_ranges(f"{root}/folder/file", [(2, 5)])
    with pytest.raises(StorageError, match="it ends before the bytes that are needed"):
        files.read_ranges(f"{root}/folder/file", [(9, 5)])
    nowhere = place[0].replace("bucket", "nobody")
    looks: list[Callable[[str], object]] = [files.read_bytes, files.source_version, files.exists, files.list_names]
    for look in [*looks, files.read_if_there]:
        with pytest.raises(StorageError, match="bucket nobody does not exist"):
            look(f"{nowhere}/x")
    assert list(tmp_path.iterdir()) == []


def test_versions_of_many_are_asked_for_side_by_side(place: tuple[str, Faults]) -> None:
    root = f"{place[0]}/many"
    for number in range(20):
        files.write_bytes(f"{root}/{number:x}a/file", bytes(number))
    ask = ask_all([*(f"{root}/{number:x}a/file" for number in range(20)), f"{root}/no"])
    assert [ask(f"{root}/{number:x}a/file").size for number in range(20)] == [*range(20)]
    with pytest.raises(StorageError, match="does not exist"):
        ask(f"{root}/no")
    assert folder_names(root) == {f"{number:x}a" for number in range(20)}


@pytest.mark.parametrize("fault", ["busy", "reset"])
def test_what_passes_is_waited_for(place: tuple[str, Faults], fault: str) -> None:
    uri, faults = f"{place[0]}/faults-{fault}", place[1]
    files.write_bytes(uri, b"0123456789")
    faults.times(fault, 2)  # type: ignore[arg-type]
    assert files.read_ranges(uri, [(2, 3)]) == [b"234"]
    faults.times(fault, 1)  # type: ignore[arg-type]
    files.write_bytes(uri, b"new")
    assert files.read_bytes(uri) == b"new"


def test_a_store_is_read_and_verified_there(
    place: tuple[str, Faults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = patch_store(tmp_path, monkeypatch)
    upload_tree(spec.parent, f"{place[0]}/store")
    there, here = open_store(f"{place[0]}/store"), open_store(str(spec))
    assert there.arrow().to_table().equals(here.arrow().to_table())
    report = verify_store(f"{place[0]}/store", 4, lambda done, total: None)
    assert (report.slides, report.damage, report.leftovers) == (3, [], [])


@pytest.mark.slow
def test_a_file_is_replaced_only_while_it_is_what_was_read(place: tuple[str, Faults]) -> None:
    if place[0].startswith("gs"):
        pytest.skip("rclone ignores Google's conditions")
    uri = f"{place[0]}/tagged"
    later = check_replaced_only_as_it_was_read(uri)
    files.delete(uri)
    with pytest.raises(ChangedError):
        files.replace(uri, b"5", later)


@pytest.mark.slow
def test_a_file_that_is_written_once_is_another_s_or_ones_own(
    place: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{place[0]}/once"
    assert create_json(uri, {"a": 1})
    assert create_json(uri, {"a": 1})
    assert not create_json(uri, {"a": 2})
    if place[0].startswith("az"):  # of two that both saw nothing, too
        monkeypatch.setattr("pipeline.storage.once.read_if_there", lambda _: None)
        assert not create_json(uri, {"a": 3})
    assert files.read_json(uri) == {"a": 1}


@pytest.mark.slow
def test_of_six_that_claim_at_the_same_moment_one_has_the_lease(place: tuple[str, Faults]) -> None:
    if place[0].startswith("gs"):
        pytest.skip("rclone ignores Google's conditions")
    uri = f"{place[0]}/lease"
    assert six_that_claim(uri) == ["held", *["same moment"] * 5]
    assert lease._living(uri, "work")[0] is None


def test_without_obstore_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "obstore.store", None)
    objects._connect.cache_clear()
    with pytest.raises(StorageError, match=r'pip install "ips-pipeline\[clouds\]"'):
        files.write_bytes("gs://bucket-of-nobody/x", b"")
    objects._connect.cache_clear()
