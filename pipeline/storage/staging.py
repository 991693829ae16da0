"""Copies of remote slides on a node's own disk, within a budget of bytes, shared by the processes of the node.

Only slides that no reader can read in place, or that are several files, come here. The least recently used go first;
what a process holds stays.
All bookkeeping happens under one lock file, and a second lock marks what is held: both are `flock`s, which the kernel
frees when a process dies.

    <folder>/lock                 held for milliseconds
    <folder>/<entry>/held         shared lock: in use; its time of change: last use
    <folder>/<entry>/bytes        what the entry takes, written before anything is copied
    <folder>/<entry>/files/       the slide and its companions, renamed to this when complete
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import NodeError, SlideError, StorageError
from pipeline.storage import files
from pipeline.storage.files import SourceVersion

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # only of the disk that is written
POLL_S = 0.2  # how often a process looks again whether another one has finished its copy, or freed room
GIB = 2**30


@dataclass(frozen=True)
class Fetched:
    """All bytes of a remote file."""

    version: SourceVersion
    data: bytes


def fetch(uri: str) -> Fetched:
    """A file in a cloud, whole and of one state, in one request.

    Raises:
        StorageError: it cannot be read.
    """
    with files.failures(uri, "read"):
        tag, data = files.cloud(uri).fetch(uri)
        return Fetched(SourceVersion(len(data), tag.partition(" ")[0], None), data)


@dataclass(frozen=True)
class Staging:
    """Where copies are kept and how much they may take. Picklable: each process of a node opens the same folder."""

    folder: str | None = None
    """None: below the system's folder for temporary files."""
    budget: int = 50 * GIB
    """Bytes."""

    @contextmanager
    def hold(self, uri: str, members: Sequence[str], fetched: Fetched | None = None) -> Iterator[Path]:
        """A local copy of a remote slide, kept at least until the block ends.

        Waits while another process copies the same slide, or while all room is held by others.

        Args:
            uri: the slide's main file.
            members: all its files, `uri` among them, which lie in its folder or below.
            fetched: the main file where it was read before; written instead of read again, unless it changed.

        Raises:
            SlideError: "cache", the slide alone is over the budget.
            StorageError: a file cannot be read.
            NodeError: the copy cannot be written.
        """
        versions = {file: files.source_version(file) for file in members}
        size = sum(version.size for version in versions.values())
        if size > self.budget:
            raise SlideError(
                "cache",
                f"{uri}: its {size / GIB:.1f} GiB are more than tiling.cache_gib={self.budget / GIB:g} allows on a "
                "node; raise it, or convert the slide to a tiled TIFF, which is read in place",
            )
        state = json.dumps({file: asdict(version) for file, version in versions.items()}, sort_keys=True)
        above = files.parent(uri) + "/"
        with self._writing(uri):
            entry = self._root() / hashlib.sha256(state.encode()).hexdigest()[:32]
            held = self._grip(entry, size)
        try:
            if not (entry / "files").exists():
                data = {uri: fetched.data} if fetched is not None and fetched.version == versions[uri] else {}
                with self._writing(uri):
                    _fill(entry, above, members, data)
            yield entry / "files" / files.absolute(uri).removeprefix(above)
        finally:
            os.close(held)

    @contextmanager
    def _writing(self, uri: str) -> Iterator[None]:
        """Tell a folder that cannot be written from a slide that cannot be read."""
        try:
            yield
        except (OSError, StorageError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(error, StorageError) and not (isinstance(cause, OSError) and cause.errno in _FULL):
                raise
            raise NodeError(
                f"{self._place()} on {socket.gethostname()}: cannot keep a copy of {uri} there: {cause}; free space, "
                "or name a folder with more in tiling.cache and what it may hold in tiling.cache_gib="
                f"{self.budget / GIB:g}"
            ) from error

    def _place(self) -> Path:
        return Path(self.folder or Path(tempfile.gettempdir(), f"ips-slides-{os.getuid()}"))

    def _root(self) -> Path:
        """Made so that nobody else may read the slides in it; a folder that is named and there keeps its mode."""
        root = self._place()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder is None and root.stat().st_mode & 0o077:  # of an earlier release; PermissionError: another's
            root.chmod(0o700)
        return root

    def _grip(self, entry: Path, size: int) -> int:
        """Hold an entry that is complete, or that this process has to fill; waits for either."""
        while True:
            with self._locked():
                if not (entry / "files").exists() and entry.exists() and not _evict(entry):
                    pass  # being filled by another process
                elif (entry / "files").exists() or self._make_room(size):
                    return _held(entry, size)
            time.sleep(POLL_S)

    def _make_room(self, size: int) -> bool:
        """Evict until `size` more bytes fit; False when too much is held."""
        entries = sorted(self._root().glob("*/held"), key=lambda held: held.stat().st_mtime_ns)
        sizes = {held.parent: _size(held.parent) for held in entries}
        taken = {entry: found or 0 for entry, found in sizes.items() if found is not None or not _evict(entry)}
        for entry in list(taken):
            if sum(taken.values()) + size <= self.budget:
                break
            if _evict(entry):
                del taken[entry]
        return sum(taken.values()) + size <= self.budget

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._root() / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _size(entry: Path) -> int | None:
    """What an entry takes, bytes; None where that is not known, so that it is no copy to keep."""
    try:
        return int((entry / "bytes").read_text())
    except (FileNotFoundError, ValueError):
        return None


def _held(entry: Path, size: int) -> int:
    """A file descriptor that holds the entry until it is closed. Under the lock."""
    entry.mkdir(exist_ok=True)
    if _size(entry) is None:  # that of a complete copy is left alone: a full disk, or a kill, would spoil it
        (entry / "bytes.tmp").write_text(str(size))
        (entry / "bytes.tmp").replace(entry / "bytes")
    held = os.open(entry / "held", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_SH)
    os.utime(entry / "held")
    return held


def _evict(entry: Path) -> bool:
    """Delete an entry unless a process holds it. Under the lock.

    Should this process be killed meanwhile, what is left counts as an unfinished copy, and its bytes as taken.
    """
    if (entry / "held").exists():
        with (entry / "held").open("rb") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    if (entry / "files").exists():
        (entry / "files").rename(entry / "unfinished")
    if (entry / "unfinished").exists():
        shutil.rmtree(entry / "unfinished")
    shutil.rmtree(entry)
    return True


def _fill(entry: Path, above: str, members: Sequence[str], data: Mapping[str, bytes]) -> None:
    """Copy the files of a held entry; what a failure leaves is evicted by the next that needs the room."""
    unfinished = entry / "unfinished"
    for file in members:
        path = unfinished / files.absolute(file).removeprefix(above)
        if file in data:
            files.write_bytes(str(path), data[file])
        else:
            files.download(file, path)
    unfinished.rename(entry / "files")
