"""A bounded pool of Ray actors that each hold something costly, as models, and work on one item at a time.

An actor that is lost, with its process or its node, is replaced, and its item is tried again elsewhere.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster import Bundle, ended, require
from pipeline.errors import PipelineError, StageError
from pipeline.storage.attempts import MAX_ATTEMPTS

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Room:
    """What the pool may take."""

    actors: int
    """At most; fewer where the cluster has no room."""
    cpus: float
    """Of each."""
    gpus: float
    timeout_s: float
    """How long the cluster may take until it could ever hold one."""
    node: str | None = None
    """Id of the node that all of them are to be on; None: any."""


class _Actor(Generic[Item, Found]):
    """Makes what it holds in its own process."""

    def __init__(self, make: Callable[[], Callable[[Item], Found]], threads: int) -> None:
        self._make, self._threads = make, threads

    def ready(self) -> None:
        """Return once it is made: what goes wrong in Ray's own creation of an actor comes back as text."""
        import torch

        torch.set_num_threads(self._threads)
        self._work = self._make()

    def work(self, item: Item) -> Found:
        """What comes of one item."""
        return self._work(item)


def pooled(
    make: Callable[[], Callable[[Item], Found]],
    items: Sequence[Item],
    room: Room,
    what: str,
    then: Callable[[int, Found | StageError], Sequence[Item]] | None = None,
) -> Iterator[tuple[int, Found | StageError]]:
    """What comes of each item, by its place, as soon as it is there; on an initialised Ray.

    An item whose actor was lost `MAX_ATTEMPTS` times gives the StageError that says so; the others go on.

    Args:
        make: called in each actor; gives the function of an item.
        items: those in front begin first.
        room: for the actors.
        what: the work, for messages.
        then: is told of what came of an item before others are; gives more items, which are the next to begin and have
            the next places.

    Raises:
        ResourceError: the cluster can never hold an actor.
        StageError: actors are lost before they are ready, time and again.
        PipelineError: what making one, or an item, raises.
    """
    require([Bundle(room.cpus, room.gpus)], room.timeout_s, what)
    pool = _Pool(make, room.actors if then else min(room.actors, len(items)), room, what)
    try:
        yield from pool.run(list(items), then or (lambda _place, _found: ()))
    finally:
        pool.close()


class _Pool(Generic[Item, Found]):
    def __init__(self, make: Callable[[], Callable[[Item], Found]], actors: int, room: Room, what: str) -> None:
        self._make, self._room, self._what = make, room, what
        place = None if room.node is None else NodeAffinitySchedulingStrategy(room.node, soft=False)
        options = {"num_cpus": room.cpus, "num_gpus": room.gpus, "max_restarts": 0, "scheduling_strategy": place}
        self._kind = ray.remote(**options)(_Actor)
        self._actors: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._busy: dict[Any, tuple[Any, int]] = {}
        self._losses = 0
        for _ in range(actors):
            self._start()

    def run(
        self, items: list[Item], then: Callable[[int, Found | StageError], Sequence[Item]]
    ) -> Iterator[tuple[int, Found | StageError]]:
        waiting, tries, idle = deque(range(len(items))), [0] * len(items), deque[Any]()
        while waiting or self._busy:
            while waiting and idle:
                actor, place = idle.popleft(), waiting.popleft()
                tries[place] += 1
                self._busy[actor.work.remote(items[place])] = actor, place
            (ref, *_), _ = ray.wait([*self._busy, *self._starting], num_returns=1)
            if ref in self._starting:
                idle += self._arrived(ref)
                continue
            actor, place = self._busy.pop(ref)
            try:
                found = self._result(ref)
            except RayError as error:
                lost = self._lost(error, tries[place])
                if lost is None:
                    waiting.appendleft(place)
                    continue
                found = lost
            else:
                idle.append(actor)
            more = then(place, found)
            waiting.extendleft(reversed(range(len(items), len(items) + len(more))))
            items += more
            tries += [0] * len(more)
            yield place, found

    def close(self) -> None:
        """End all actors."""
        for actor in self._actors:
            ray.kill(actor)

    def _start(self) -> None:
        actor = self._kind.remote(self._make, max(1, int(self._room.cpus)))
        self._actors.append(actor)
        self._starting[actor.ready.remote()] = actor

    def _arrived(self, ref: Any) -> list[Any]:
        """An actor that is made; none where it was lost on the way."""
        actor = self._starting.pop(ref)
        try:
            self._result(ref)
        except RayError as error:
            self._losses += 1
            if (lost := self._lost(error, self._losses)) is not None:
                raise lost from error
            return []
        return [actor]

    def _result(self, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, PipelineError):
                raise error.cause from error
            raise StageError(f"{self._what}: {type(error.cause).__name__}: {error.cause}") from error

    def _lost(self, error: RayError, tries: int) -> StageError | None:
        """Replace an actor; what is to be said where what it did was tried often enough."""
        said = ended(error) or str(error).strip().splitlines()[0]
        self._start()
        if tries >= MAX_ATTEMPTS:
            return StageError(f"{self._what}: {said}, {tries} times; where memory is short, lower cluster.workers")
        log.warning("%s: %s; it is tried again", self._what, said)
        return None
