"""Large items on real Ray actors, some of which are lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StageError
from pipeline.inference.shards import Cut, Joined
from pipeline.results.parts import pooled_in_parts
from pipeline.results.pool import Room

ROOM = Room(actors=2, cpus=1.0, gpus=0.0, timeout_s=5.0)


def _sum(folder: str, item: Any) -> Any:
    """Items from 10 on are cut into their digits; digit 7 kills its process the first time, 9 always."""
    match item:
        case Joined(whole, found):
            return whole, found
        case ("digit", digit):
            tries = Path(folder) / f"{digit}-{time.monotonic_ns()}"
            tries.touch()
            if digit == 9 or (digit == 7 and len(list(Path(folder).glob("7-*"))) == 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return 2 * digit
        case int() if item >= 10:
            return Cut(tuple(("digit", int(digit)) for digit in str(item)))
    return item


def _make(folder: str) -> Callable[[Any], Any]:
    return partial(_sum, folder)


@pytest.mark.slow
@pytest.mark.ray
def test_parts_come_together_in_their_order_and_a_lost_one_is_tried_again(ray_session: None, tmp_path: Path) -> None:
    items = [3, 1742, 5, 29, 4]
    found = list(pooled_in_parts(partial(_make, str(tmp_path)), items, ROOM, "digits"))
    assert sorted(place for place, _ in found) == [0, 1, 2, 3, 4]  # each once
    by_place = dict(found)
    assert [by_place[place] for place in (0, 2, 4)] == [3, 5, 4]
    assert by_place[1] == (1742, (2, 14, 8, 4))
    assert len(list(tmp_path.glob("7-*"))) == 2
    assert isinstance(by_place[3], StageError)
    assert "was killed" in str(by_place[3])
