"""A pool of real Ray actors, some of which are lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import ResourceError, SlideError, StageError
from pipeline.results.pool import Room, pooled

pytestmark = pytest.mark.ray
ROOM = Room(actors=2, cpus=1.0, gpus=0.0, timeout_s=5.0)


def _squares(folder: str, item: int) -> tuple[int, int]:
    """Item 3 kills its process the first time it is tried, item 5 always; 7 is wrong."""
    tries = Path(folder) / f"{item}-{time.monotonic_ns()}"
    tries.touch()
    if item == 5 or (item == 3 and len(list(Path(folder).glob("3-*"))) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 7:
        raise SlideError("odd", "seven")
    return item * item, os.getpid()


def _make(folder: str) -> Callable[[int], tuple[int, int]]:
    return partial(_squares, folder)


@pytest.mark.slow
def test_each_item_once_and_a_lost_actor_is_replaced(ray_session: None, tmp_path: Path) -> None:
    found = dict(pooled(partial(_make, str(tmp_path)), [0, 1, 2, 3, 4], ROOM, "squares"))
    assert [found[place][0] for place in range(5)] == [0, 1, 4, 9, 16]  # type: ignore[index]
    assert len(list(tmp_path.glob("3-*"))) == 2
    assert os.getpid() not in {found[place][1] for place in range(5)}  # type: ignore[index]


@pytest.mark.slow
def test_an_item_that_always_kills_fails_alone(ray_session: None, tmp_path: Path) -> None:
    found = dict(pooled(partial(_make, str(tmp_path)), [1, 5, 2], ROOM, "squares"))
    assert isinstance(found[1], StageError)
    assert "was killed" in str(found[1])
    assert "3 times" in str(found[1])
    assert [found[place][0] for place in (0, 2)] == [1, 4]  # type: ignore[index]


def test_errors_of_ours_come_back_as_themselves(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="seven") as caught:
        list(pooled(partial(_make, str(tmp_path)), [7], ROOM, "squares"))
    assert caught.value.reason == "odd"


def _broken() -> Callable[[int], int]:
    raise StageError("no weights")


def test_what_cannot_be_made_ends_it(ray_session: None) -> None:
    with pytest.raises(StageError, match="no weights"):
        list(pooled(_broken, [1], ROOM, "squares"))


def test_what_can_never_be_given_is_said_at_once(ray_session: None) -> None:
    with pytest.raises(ResourceError, match="squares needs 1 x"):
        list(pooled(_broken, [1], Room(1, 999.0, 0.0, 0.1), "squares"))
