from __future__ import annotations

import contextlib
import subprocess
import sys
import uuid

from pipeline.storage.attempts import attempt


def test_a_killed_process_counts_and_an_end_forgets() -> None:
    name = uuid.uuid4().hex
    code = f"import os\nfrom pipeline.storage.attempts import attempt\nwith attempt({name!r}): os._exit(9)"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with attempt(name) as number:
        assert number == 3
    with attempt(name) as number:
        assert number == 1


def test_an_error_of_the_work_leaves_the_count() -> None:
    name = uuid.uuid4().hex
    with contextlib.suppress(ValueError), attempt(name) as number:
        raise ValueError(number)
    with attempt(name) as number:
        assert number == 2
