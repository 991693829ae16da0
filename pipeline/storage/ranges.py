"""Bytes of one file by range, from the local disk or from S3, and reading ahead in few large requests."""

from __future__ import annotations

import errno
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from pipeline.errors import SlideError, StorageError
from pipeline.storage import files
from pipeline.telemetry import note, spending

Range = tuple[int, int]
"""Start and length."""

GAP = 16 * 2**10  # bytes nobody asked for that are read along rather than skipped: a tile or two
RUN = 4 * 2**20  # of one request: 40 ms at 100 MB/s, as long as S3 takes to answer at all
WINDOW = 16 * 2**20  # read ahead at once: four requests side by side on S3; two windows are held
LOCAL_WINDOW = 2 * 2**20  # a disk needs no more
_FORMATS_OWN = {errno.EINVAL, errno.EOVERFLOW, errno.EFBIG}  # what a damaged file's offsets lead to
_PASSING = {
    errno.EACCES, errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EINTR, errno.EIO, errno.EMFILE, errno.ENETDOWN, errno.ENETUNREACH, errno.ENFILE,
    errno.ENODEV, errno.ENOMEM, errno.ENOTCONN, errno.EPERM, errno.EPIPE, errno.EREMOTEIO, errno.ESTALE,
    errno.ETIMEDOUT,
}  # fmt: skip


class ByteSource(ABC):
    """A file that is read by ranges."""

    name: str
    """For messages."""
    size: int
    remote: bool
    bytes_read = 0
    """So far."""

    @abstractmethod
    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range; fewer where the file ends.

        Raises:
            SlideError: the file cannot be read any more.
        """

    def _inside(self, ranges: Sequence[Range]) -> list[Range]:
        """The ranges, cut off where the file ends: a damaged directory may ask for any number of bytes."""
        return [(min(start, self.size), max(0, min(length, self.size - start))) for start, length in ranges]

    @abstractmethod
    def close(self) -> None:
        """Free the file."""


class LocalSource(ByteSource):
    """A file on a local disk, kept open: replacing it by another one does not mix the two."""

    remote = False

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise SlideError("source", f"{self.name}: cannot be opened: {error.strerror}") from error
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """See `ByteSource.read`."""
        inside = self._inside(ranges)
        try:
            found = [os.pread(self._file.fileno(), length, start) for start, length in inside]
        except OSError as error:
            raise SlideError("source", f"{self.name}: cannot be read: {error.strerror}") from error
        self.bytes_read += sum(map(len, found))
        return found

    def close(self) -> None:
        """Free the file."""
        self._file.close()


class FetchedSource(ByteSource):
    """A remote file whose bytes are here already."""

    remote = False

    def __init__(self, uri: str, data: bytes) -> None:
        self.name = PurePosixPath(uri).name
        self.size = len(data)
        self._data = data

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """See `ByteSource.read`."""
        found = [self._data[start : start + length] for start, length in ranges]
        self.bytes_read += sum(map(len, found))
        return found

    def close(self) -> None:
        """Nothing is held open."""


class RemoteSource(ByteSource):
    """An object on S3."""

    remote = True

    def __init__(self, uri: str) -> None:
        self.name = PurePosixPath(uri).name
        self._uri = uri
        try:
            self.size = files.source_version(uri).size
        except StorageError as error:
            raise source_error(error) from error

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """See `ByteSource.read`."""
        inside = self._inside(ranges)
        try:
            found = files.read_ranges(self._uri, inside)
        except StorageError as error:
            raise source_error(error) from error
        self.bytes_read += sum(map(len, found))
        return found

    def close(self) -> None:
        """Nothing is held open."""


def source_error(error: StorageError) -> SlideError:
    """A slide that cannot be reached, as the slide's error: a StorageError is one of the store that is written."""
    reason = "missing" if isinstance(error.__cause__, FileNotFoundError) else "source"
    return SlideError(reason, str(error))


def system_error(name: str, error: Exception) -> SlideError | None:
    """A library's error as a slide that cannot be reached for now; None where it speaks of what the file holds.

    Args:
        name: of the file, for the message.
        error: of Pillow, whose errors of the format have no number, or of OpenSlide, which gives the system's reason
            as text.
    """
    if isinstance(error, OSError):
        passing = error.errno is not None and error.errno not in _FORMATS_OWN
    else:
        texts = ["I/O error reading file", *map(os.strerror, _PASSING)]
        passing = any(text in str(error) for text in texts)
    return SlideError("source", f"{name}: cannot be read: {error}; the next run tries it again") if passing else None


class SourceFile(io.RawIOBase):
    """A file that is read by ranges, as a read-only file object.

    Args:
        size: of the file, in bytes.
        read: gives the bytes of one range inside it.
    """

    def __init__(self, size: int, read: Callable[[Range], bytes]) -> None:
        self._size, self._read, self._at = size, read, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; before the start is an error, as in any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """The position."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer, as far as the file reaches."""
        length = max(0, min(len(buffer), self._size - self._at))
        if length:
            data = self._read((self._at, length))
            length = len(data)
            buffer[:length] = data
            self._at += length
        return length


class ReadAhead:
    """Ranges of a source, each asked for by itself, in about the order that was announced.

    Announced ranges are read window by window, those near each other in one request; from S3 the next window comes
    while one is in use. Memory: two windows.
    """

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._window_bytes = WINDOW if source.remote else LOCAL_WINDOW
        self._thread = ThreadPoolExecutor(1, "fetch") if source.remote else None
        self._held: dict[Range, bytes] = {}
        self._announced: list[Range] = []
        self._planned = 0
        self._coming: list[Range] = []
        self._wanted: frozenset[Range] = frozenset()
        self._fetching: Future[dict[Range, bytes]] | None = None

    def expect(self, ranges: Iterable[Range]) -> None:
        """Announce the ranges to come, instead of those announced before."""
        self._held = {}
        self._announced, self._planned = list(ranges), 0
        self._plan()

    def get(self, wanted: Range) -> bytes:
        """The bytes of one range, once; fewer where the file ends."""
        if wanted not in self._held and wanted in self._wanted:
            self._turn()
        data = self._held.pop(wanted, None)
        return self._source.read([wanted])[0] if data is None else data

    def close(self) -> None:
        """Wait for what is under way; the source itself stays open."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _turn(self) -> None:
        """The window that was planned becomes the one in use."""
        coming, fetching = self._coming, self._fetching
        self._held = {}  # frees the old one before the new one is there
        if fetching is None:
            self._held = fetch(self._source, coming)
        else:
            with spending("wait"):
                self._held = fetching.result()
        self._plan()
        if self._thread is not None and self._coming:
            self._fetching = self._thread.submit(fetch, self._source, self._coming)

    def _plan(self) -> None:
        size = stop = 0
        for stop in range(self._planned, len(self._announced)):
            size += self._announced[stop][1]
            if size > self._window_bytes and stop > self._planned:
                break
        else:
            stop = len(self._announced)
        self._coming, self._fetching = self._announced[self._planned : stop], None
        self._planned, self._wanted = stop, frozenset(self._coming)


def fetch(source: ByteSource, ranges: Sequence[Range]) -> dict[Range, bytes]:
    """The bytes of the ranges, neighbours read together."""
    runs = coalesced(ranges)
    with spending("read"):
        blocks = source.read([(run[0][0], max(map(sum, run)) - run[0][0]) for run in runs])
    note("bytes.read", sum(map(len, blocks)))
    return {
        (start, length): block[start - run[0][0] : start - run[0][0] + length]
        for run, block in zip(runs, blocks, strict=True)
        for start, length in run
    }


def coalesced(ranges: Iterable[Range]) -> list[list[Range]]:
    """The ranges in the order of their starts, in runs with gaps of at most GAP and a length of about RUN."""
    runs: list[list[Range]] = []
    end = 0
    for start, length in sorted(set(ranges)):
        if runs and start - end <= GAP and start + length - runs[-1][0][0] <= RUN:
            runs[-1].append((start, length))
        else:
            runs.append([(start, length)])
            end = 0
        end = max(end, start + length)
    return runs
