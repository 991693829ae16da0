"""How often a task was begun on this node, however it ended.

Ray retries a task whose process dies (segmentation fault, out of memory) without end, so one slide could hold a whole
run for ever; a file outlives the process and counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_ATTEMPTS = 3
"""On one node, at work whose process is killed."""


@contextmanager
def attempt(name: str) -> Iterator[int]:
    """The number of this attempt at the work of that name on this node, from 1; forgotten when it ends by itself."""
    path = Path(tempfile.gettempdir()) / f"ips-task-{name}"
    with path.open("ab") as file:
        file.write(b".")
    yield path.stat().st_size
    path.unlink()
