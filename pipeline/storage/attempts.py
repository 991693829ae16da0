"""How often a task was begun on this node, however it ended.

Ray retries a task whose process dies (segmentation fault, out of memory) without end, so one slide could hold a whole
run for ever; a file outlives the process and counts.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import NodeError

MAX_ATTEMPTS = 3
"""On one node, at work whose process is killed."""


@contextmanager
def attempt(name: str) -> Iterator[int]:
    """The number of this attempt at the work of that name on this node, from 1; forgotten when it ends by itself.

    Raises:
        NodeError: the folder for temporary files is full, or cannot be written.
    """
    path = Path(tempfile.gettempdir()) / f"ips-task-{name}"
    try:
        with path.open("ab") as file:
            file.write(b".")
    except OSError as error:
        raise NodeError(
            f"cannot write {path} on {socket.gethostname()}: {error.strerror}; free space in {path.parent}, or name "
            "another folder in the environment's TMPDIR on that node"
        ) from error
    yield path.stat().st_size
    path.unlink()
