"""Bytes by range: the same from disk and from S3, few requests, and no more bytes than were asked for."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SlideError
from pipeline.storage import ranges as byte_source
from pipeline.storage.ranges import (
    GAP,
    RUN,
    ByteSource,
    FetchedSource,
    LocalSource,
    Range,
    ReadAhead,
    RemoteSource,
    SourceFile,
    coalesced,
    fetch,
    system_error,
)
from tests.s3 import S3Server, serve_s3

DATA = np.random.default_rng(0).bytes(300_000)

ranges = st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 2 * 10**6)), max_size=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("slides")
        (server.folder / "slides" / "a b.bin").write_bytes(DATA)
        yield server


@pytest.fixture(params=["disk", "s3", "fetched"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ByteSource]:
    found: ByteSource
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("server")
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        found = RemoteSource("s3://slides/a b.bin")
    elif request.param == "fetched":
        found = FetchedSource("s3://slides/a b.bin", DATA)
    else:
        (tmp_path / "a b.bin").write_bytes(DATA)
        found = LocalSource(tmp_path / "a b.bin")
    yield found
    found.close()


def test_ranges_and_what_lies_behind_the_end(source: ByteSource) -> None:
    assert (source.name, source.size) == ("a b.bin", len(DATA))
    wanted = [(5, 7), (299_990, 10), (0, 0), (299_990, 50), (400_000, 5)]
    assert source.read(wanted) == [DATA[start : start + length] for start, length in wanted]
    assert source.bytes_read == 27


def test_as_a_file(source: ByteSource) -> None:
    file = io.BufferedReader(SourceFile(source.size, lambda wanted: source.read([wanted])[0]), 1000)
    twin = io.BytesIO(DATA)
    for offset, whence, length in ((7, 0, 20), (1000, 1, 5), (-30, 2, 100), (0, 0, 3000)):
        assert file.seek(offset, whence) == twin.seek(offset, whence)
        assert file.read(length) == twin.read(length)
        assert file.tell() == twin.tell()
    with pytest.raises(ValueError, match="-1"):
        SourceFile(27, lambda wanted: source.read([wanted])[0]).seek(-1)


@pytest.mark.parametrize("window", [1, 2_000, 10**9])
@pytest.mark.parametrize("kept", ["all", "some", "none", "other order"])
def test_reading_ahead_gives_what_was_asked_for(
    source: ByteSource, window: int, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_source, "WINDOW", window)
    monkeypatch.setattr(byte_source, "LOCAL_WINDOW", window)
    rng = np.random.default_rng(3)
    wanted = [(start, length) for start, length in rng.integers([0, 1], [299_000, 900], (40, 2)).tolist()]
    ahead = ReadAhead(source)
    announced = {"all": wanted, "some": wanted[::3], "none": [], "other order": wanted[::-1]}
    ahead.expect(announced[kept])
    for start, length in [*wanted, *wanted[:5]]:
        assert ahead.get((start, length)) == DATA[start : start + length]
    ahead.expect(wanted[20:])
    assert ahead.get(wanted[20]) == DATA[wanted[20][0] :][: wanted[20][1]]
    ahead.close()


def test_neighbours_travel_together_and_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)

    requests: list[Range] = []

    class Counting(LocalSource):
        def read(self, ranges: Sequence[Range]) -> list[bytes]:
            requests.extend(ranges)
            return super().read(ranges)

    source = Counting(tmp_path / "a")
    wanted = [(start, 900) for start in range(0, 90_000, 900)] + [
        (200_000 + start, 900) for start in range(0, 9000, 900)
    ]
    ahead = ReadAhead(source)
    ahead.expect(wanted)
    assert [ahead.get(span) for span in wanted] == [DATA[start : start + length] for start, length in wanted]
    assert requests == [(0, 90_000), (200_000, 9000)]
    source.close()


@given(ranges)
def test_runs_cover_every_range_once(wanted: list[Range]) -> None:
    runs = coalesced(wanted)
    assert sorted(span for run in runs for span in run) == sorted(set(wanted))
    for run in runs:
        ends = np.maximum.accumulate([start + length for start, length in run])
        assert all(run[i + 1][0] - ends[i] <= GAP for i in range(len(run) - 1))
        assert ends[-1] - run[0][0] <= max(RUN, max(length for _, length in run))


@given(st.lists(st.tuples(st.integers(0, 290_000), st.integers(1, 30_000)), max_size=30))
def test_fetched_ranges_are_the_files(wanted: list[Range]) -> None:
    class Memory(ByteSource):
        def read(self, ranges: Sequence[Range]) -> list[bytes]:
            return [DATA[start : start + length] for start, length in ranges]

        def close(self) -> None:
            pass

    assert fetch(Memory(), wanted) == {(start, length): DATA[start : start + length] for start, length in wanted}


def test_what_cannot_be_reached_is_the_slides_fault(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SlideError, match="none.bin") as caught:
        RemoteSource("s3://slides/none.bin")
    assert caught.value.reason == "missing"
    (server.folder / "slides" / "gone.bin").write_bytes(DATA)
    source = RemoteSource("s3://slides/gone.bin")
    (server.folder / "slides" / "gone.bin").unlink()
    with pytest.raises(SlideError, match="gone.bin"):
        source.read([(0, 10)])


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), True),
        (OSError(errno.EINVAL, "Invalid argument"), False),  # a seek to where a damaged file points
        (OSError("image file is truncated"), False),
        (OSError(-2), False),  # Pillow's decoders
        (SyntaxError("broken PNG file"), False),
        (RuntimeError("Couldn't open a.mrxs/Data0.dat: Too many open files"), True),
        (RuntimeError("I/O error reading file a.ndpi"), True),
        (RuntimeError("Couldn't open a.mrxs/Data0.dat: No such file or directory"), False),
    ],
)
def test_which_errors_of_libraries_are_the_systems(error: Exception, *, passes: bool) -> None:
    found = system_error("a.svs", error)
    assert (found is not None) == passes
    if found is not None:
        assert found.reason == "source"
        assert str(error) in str(found)
