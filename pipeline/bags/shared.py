"""One reading of a bag for several models, which go through its chunks in step.

Each model runs as it would alone, on a view of the bag, in a thread of its own; but one of them computes at a time,
until it asks for its next chunk. So a chunk is read and decoded once, whoever needs it, no more chunks are held than
for one model, and each model's numbers are those that it has alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from threading import Semaphore, Thread
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ips.bag import Bag, Chunk

Result = TypeVar("Result")


class Reading:
    """The seconds that a bag's readers took, whoever waited for them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks; the wait for each is counted."""
        while True:
            began = time.perf_counter()
            chunk = next(chunks, None)
            self.seconds += time.perf_counter() - began
            if chunk is None:
                return
            yield chunk


class _View(Generic[Result]):
    """The bag as one model sees it, and the thread that the model runs in."""

    def __init__(self, bag: Bag, work: Callable[[Bag], Result]) -> None:
        self._bag, self._work = bag, work
        self._go, self._stopped = Semaphore(0), Semaphore(0)
        self._given: Chunk | Exception | None = None
        self._thread = Thread(target=self._run, daemon=True, name="shared-bag")
        self.wants: int | None = None
        """Rows a chunk, where it waits for one."""
        self._found: list[Result | Exception] = []
        self.seconds = 0.0
        """That it computed."""

    def __len__(self) -> int:
        return len(self._bag)

    def take(self, rows: Tensor) -> Chunk:
        """As the bag's."""
        return self._bag.take(rows)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """As the bag's, once all others ask for theirs too."""
        return rechunked(iter(partial(self._next, size), None), size)

    @property
    def found(self) -> Result | Exception:
        """What came of it, once it has ended."""
        (found,) = self._found
        return found

    def start(self) -> None:
        """Run until it waits for a chunk, or ends."""
        self._thread.start()
        self._turn()

    def give(self, part: Chunk | Exception | None) -> None:
        """Go on with a chunk, with what reading it raised, or with None for the end."""
        self._given, self.wants = part, None
        self._turn()

    def _turn(self) -> None:
        began = time.perf_counter()
        self._go.release()
        self._stopped.acquire()
        self.seconds += time.perf_counter() - began

    def _next(self, size: int) -> Chunk | None:
        self.wants = size
        self._stopped.release()
        self._go.acquire()
        if isinstance(self._given, Exception):
            raise self._given
        return self._given

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._found.append(self._work(self))
        except Exception as error:  # of this model alone; handed on
            self._found.append(error)
        self.wants = None
        self._stopped.release()


def together(bag: Bag, works: Sequence[Callable[[Bag], Result]]) -> tuple[list[Result | Exception], list[float], float]:
    """What each work makes of the bag, or what it raised; the seconds of each, and those of reading for all.

    A work that goes through the chunks again waits for the others that do.
    """
    views = [_View(bag, work) for work in works]
    reading = Reading()
    for view in views:
        view.start()
    while waiting := [view for view in views if view.wants is not None]:
        end: Exception | None = None
        try:
            for part in reading.timed(bag.chunks(max(view.wants or 0 for view in waiting))):
                waiting = [view for view in waiting if view.wants is not None]
                if not waiting:
                    break
                for view in waiting:
                    view.give(part)
        except Exception as error:  # of the bag: each of them has it
            end = error
        for view in waiting:
            if view.wants is not None:
                view.give(end)
    return [view.found for view in views], [view.seconds for view in views], reading.seconds


def rechunked(parts: Iterable[Chunk | None], size: int) -> Iterator[Chunk]:
    """The same rows in chunks of `size`, but for the last."""
    left: list[Chunk] = []
    for part in parts:
        assert part is not None
        left.append(part)
        while (held := sum(len(one.index) for one in left)) >= size:
            whole = left[0] if len(left) == 1 else _joined(left)
            yield _cut(whole, 0, size)
            left = [_cut(whole, size, held)] if held > size else []
    if left:
        yield left[0] if len(left) == 1 else _joined(left)


def _joined(parts: Sequence[Chunk]) -> Chunk:
    places = [part.positions for part in parts if part.positions is not None]
    return Chunk(
        torch.cat([part.patches for part in parts]),
        torch.cat([part.index for part in parts]),
        torch.cat(places) if len(places) == len(parts) else None,
    )


def _cut(part: Chunk, start: int, stop: int) -> Chunk:
    if (start, stop) == (0, len(part.index)):
        return part
    places = None if part.positions is None else part.positions[start:stop]
    return Chunk(part.patches[start:stop], part.index[start:stop], places)
