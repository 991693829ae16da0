"""Copies of remote slides on a node: within the budget, the least recently used go, processes share them."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import NodeError, SlideError, StorageError
from pipeline.storage import files
from pipeline.storage.staging import Fetched, Staging
from tests.s3 import S3Server, serve_s3

SIZE = 1000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("slides")
        for name in ("a", "b", "c", "d"):
            (server.folder / "slides" / f"{name} ä.ndpi").write_bytes(name.encode() * SIZE)
        (server.folder / "slides" / "m").mkdir()
        (server.folder / "slides" / "m" / "Data.dat").write_bytes(b"m" * 10)
        (server.folder / "slides" / "m.mrxs").write_bytes(b"x" * 20)
        yield server


@pytest.fixture
def downloads(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was copied."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    seen: list[str] = []
    real = files.download

    def counted(uri: str, path: Path) -> None:
        seen.append(uri)
        real(uri, path)

    monkeypatch.setattr(files, "download", counted)
    return seen


def uri(name: str) -> str:
    return f"s3://slides/{name} ä.ndpi"


def taken(folder: Path) -> int:
    """Bytes of the copies that are there; what another process deletes meanwhile is not."""
    total = 0
    for copies in folder.glob("*/files"):
        for above, _, names in os.walk(copies):
            for name in names:
                with suppress(FileNotFoundError):
                    total += (Path(above) / name).stat().st_size
    return total


def test_a_copy_is_made_once_and_kept(tmp_path: Path, downloads: list[str]) -> None:
    staging = Staging(str(tmp_path), 10 * SIZE)
    for _ in range(2):
        with staging.hold(uri("a"), [uri("a")]) as path:
            assert path.name == "a ä.ndpi"
            assert path.read_bytes() == b"a" * SIZE
    assert downloads == [uri("a")]


def test_nobody_else_may_read_the_copies(tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"ips-slides-{os.getuid()}"
    folder.mkdir(mode=0o755)  # of an earlier release
    for staging, root in ((Staging(), folder), (Staging(str(tmp_path / "named" / "new")), tmp_path / "named" / "new")):
        with staging.hold(uri("a"), [uri("a")]):
            assert root.stat().st_mode & 0o777 == 0o700


def test_companions_lie_beside(tmp_path: Path, downloads: list[str]) -> None:
    members = ["s3://slides/m.mrxs", "s3://slides/m/Data.dat"]
    with Staging(str(tmp_path)).hold(members[0], members) as path:
        assert path.read_bytes() == b"x" * 20
        assert (path.parent / "m" / "Data.dat").read_bytes() == b"m" * 10
    assert downloads == members


def test_what_was_fetched_is_not_fetched_again_unless_it_changed(tmp_path: Path, downloads: list[str]) -> None:
    version = files.source_version(uri("a"))
    for number, fetched in enumerate((Fetched(version, b"a" * SIZE), Fetched(replace(version, etag="old"), b"old"))):
        with Staging(str(tmp_path / str(number))).hold(uri("a"), [uri("a")], fetched) as path:
            assert path.read_bytes() == b"a" * SIZE
        assert len(downloads) == number


def test_another_version_is_another_copy(tmp_path: Path, downloads: list[str], server: S3Server) -> None:
    staging = Staging(str(tmp_path))
    for content in (b"1" * 50, b"2" * 60):
        (server.folder / "slides" / "changing ä.ndpi").write_bytes(content)
        with staging.hold(uri("changing"), [uri("changing")]) as path:
            assert path.read_bytes() == content
    assert len(downloads) == 2


def test_the_least_recently_used_goes_first(tmp_path: Path, downloads: list[str]) -> None:
    staging = Staging(str(tmp_path), 2 * SIZE)
    for name in ("a", "b", "a", "c"):  # c takes b's room
        with staging.hold(uri(name), [uri(name)]):
            assert taken(tmp_path) <= 2 * SIZE
    with staging.hold(uri("a"), [uri("a")]):
        pass
    assert downloads == [uri("a"), uri("b"), uri("c")]
    with staging.hold(uri("b"), [uri("b")]):
        pass
    assert downloads[3:] == [uri("b")]


def test_what_is_held_stays_and_others_wait(tmp_path: Path, downloads: list[str]) -> None:
    staging = Staging(str(tmp_path), 2 * SIZE)
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        held = [stack.enter_context(staging.hold(uri(name), [uri(name)])) for name in ("a", "b")]

        def third() -> bytes:
            with staging.hold(uri("c"), [uri("c")]) as path:
                return path.read_bytes()

        waiting = pool.submit(third)
        time.sleep(0.3)
        assert not waiting.done()
        assert [path.read_bytes()[:1] for path in held] == [b"a", b"b"]
        stack.close()
        assert waiting.result(timeout=30) == b"c" * SIZE
    assert downloads == [uri("a"), uri("b"), uri("c")]


def test_a_slide_over_the_budget_is_refused(tmp_path: Path, downloads: list[str]) -> None:
    with (
        pytest.raises(SlideError, match=r"tiling\.cache_gib") as caught,
        Staging(str(tmp_path), SIZE - 1).hold(uri("a"), [uri("a")]),
    ):
        pass
    assert caught.value.reason == "cache"
    assert not downloads


def test_a_failed_copy_leaves_nothing_that_counts_as_one(
    tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = Staging(str(tmp_path), SIZE)
    real = files.download

    def failing(uri: str, path: Path) -> None:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
        raise StorageError(f"cannot read {uri}: the line is dead")

    monkeypatch.setattr(files, "download", failing)
    with pytest.raises(StorageError, match="dead"), staging.hold(uri("a"), [uri("a")]):
        pass
    monkeypatch.setattr(files, "download", real)
    for name in ("a", "b"):
        with staging.hold(uri(name), [uri(name)]) as path:
            assert path.read_bytes() == name.encode() * SIZE


def test_a_copy_that_was_deleted_in_part_is_no_copy(
    tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed while it makes room."""
    staging, members = Staging(str(tmp_path), SIZE), ["s3://slides/m.mrxs", "s3://slides/m/Data.dat"]
    with staging.hold(members[0], members):
        pass
    real = shutil.rmtree

    def killed(folder: Path) -> None:
        next(path for path in Path(folder).rglob("Data.dat")).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt), staging.hold(uri("a"), [uri("a")]):
        pass
    monkeypatch.setattr(shutil, "rmtree", real)
    with staging.hold(members[0], members) as path:
        assert (path.parent / "m" / "Data.dat").read_bytes() == b"m" * 10


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow: EFBIG, as ENOSPC of a full disk."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_no_copy_that_is_there(tmp_path: Path) -> None:
    slides = [tmp_path / name for name in ("a.ndpi", "b.ndpi")]
    for slide in slides:
        slide.write_bytes(slide.name.encode() * SIZE)
    one, other = map(str, slides)
    staging = Staging(str(tmp_path / "cache"), 9 * SIZE)
    with staging.hold(one, [one]):
        pass
    with full_disk():
        with staging.hold(one, [one]) as path:
            assert path.stat().st_size == 6 * SIZE
        with pytest.raises(NodeError, match="cannot keep a copy"), staging.hold(other, [other]):
            pass
    for uri in (other, one, other):
        with staging.hold(uri, [uri]) as path:
            assert path.read_bytes() == Path(uri).read_bytes()
            assert taken(tmp_path / "cache") <= 9 * SIZE


@pytest.mark.parametrize("damage", ["", "12x", None])
def test_a_copy_of_unknown_size_goes_first_or_is_measured_again(tmp_path: Path, damage: str | None) -> None:
    """What a process left that was killed while it wrote the size."""
    slides = [tmp_path / name for name in ("a.ndpi", "b.ndpi", "c.ndpi")]
    for slide in slides:
        slide.write_bytes(slide.name.encode() * SIZE)
    staging, cache = Staging(str(tmp_path / "cache"), 60 * SIZE), tmp_path / "cache"
    for slide in slides[:2]:
        with staging.hold(str(slide), [str(slide)]):
            pass
    for size in cache.glob("*/bytes"):
        if damage is None:
            size.unlink()
        else:
            size.write_text(damage)
    with staging.hold(str(slides[1]), [str(slides[1])]) as path:
        assert (path.parents[1] / "bytes").read_text() == str(6 * SIZE)
        with staging.hold(str(slides[2]), [str(slides[2])]):
            assert sorted(path.name for path in cache.glob("*/files/*")) == ["b.ndpi", "c.ndpi"]


def hold_often(folder: str, seed: int) -> None:
    staging = Staging(folder, 2 * SIZE)
    for turn in range(12):
        name = "abcd"[(seed + turn * (1 + seed)) % 4]
        with staging.hold(uri(name), [uri(name)]) as path:
            assert path.read_bytes() == name.encode() * SIZE
            # A look is not atomic: it may count a copy and the one that took its room. A real overflow stays.
            assert any(taken(Path(folder)) <= 2 * SIZE for _ in range(20))


def hold_for_ever(folder: str) -> None:
    with Staging(folder, SIZE).hold(uri("a"), [uri("a")]):
        time.sleep(600)


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_several_processes_share_the_copies(tmp_path: Path, downloads: list[str]) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=hold_often, args=(str(tmp_path), seed)) for seed in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_what_a_killed_process_held_is_free_again(tmp_path: Path, downloads: list[str]) -> None:
    process = multiprocessing.get_context("spawn").Process(target=hold_for_ever, args=(str(tmp_path),))
    process.start()
    while not list(tmp_path.glob("*/files")):
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with Staging(str(tmp_path), SIZE).hold(uri("b"), [uri("b")]) as path:
        assert path.read_bytes() == b"b" * SIZE
    assert taken(tmp_path) == SIZE
