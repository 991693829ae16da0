"""Folders for the length of a block, below the system's folder for temporary files, that no kill leaves for good.

Who has one holds a lock in it, which the kernel frees when the process dies however it dies; whoever makes the next one
removes those that nobody holds.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HELD = "held"
_PREFIX = "ips-scratch-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder that nobody else may read; removed when the block ends, or by the next one."""
    _remove_abandoned()
    place = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        with (place / "new").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (place / "new").rename(place / _HELD)  # seen by others only now that it is held
            (place / "files").mkdir()
            yield place / "files"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _remove_abandoned() -> None:
    """What another process removes at the same moment, or another user has made, is passed over."""
    for held in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_HELD}"):
        try:
            with held.open("rb+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(held.parent, ignore_errors=True)
        except OSError:
            continue
