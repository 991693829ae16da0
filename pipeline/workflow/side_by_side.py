"""Several runs of the workflow at once, as of folds: as many as the cluster holds, each in a process of its own.

Such a process does what a driver does, and like one it takes no CPU of Ray's: its tasks and training workers do. It is
on the driver's node, where an SQLite store or a local cohort may be, and what it logs appears in the driver's log.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import ray
from ray.exceptions import RayError
from ray.util.queue import Empty, Queue

from pipeline.cluster import abreast, of_training
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.results.pool import Room, pooled
from pipeline.workflow.run import plan, run
from pipeline.workflow.stage import Record

log = logging.getLogger(__name__)

_POLL_S = 1.0


@dataclass(frozen=True)
class Asked:
    """One run."""

    name: str
    """For people."""
    config: Config


def run_all(asked: Sequence[Asked], last: str, what: str) -> list[dict[str, Record]]:
    """The records of each run's stages up to `last`, in the order given; on an initialised Ray.

    Those that fit beside one another run so, at most `cluster.trainings`, and give what they give alone. What is done
    is not done again, so where one fails or is killed, the others go on from their last checkpoints at the next call.

    Args:
        asked: recipes that ask for the same resources. What they share, as the tiling, is done.
        last: name of a stage.
        what: the work, for messages.

    Raises:
        PipelineError: what the first one that fails raises.
    """
    found: dict[int, dict[str, Record]] = {}
    waiting = [place for place, one in enumerate(asked) if any(p.action != "skip" for p in plan(one.config, last))]
    held = _held(asked[0].config, len(waiting)) if len(waiting) > 1 else 1
    if held > 1:
        log.info("%s: %d of %d at a time", what, held, len(waiting))
        for place, records in _pooled([asked[place] for place in waiting], last, held, what):
            found[waiting[place]] = records
    for place, one in enumerate(asked):
        if place not in found:
            log.info("%s: %s, %d of %d", what, one.name, place + 1, len(asked))
            found[place] = _records(one, last)
    return [found[place] for place in range(len(asked))]


def _held(config: Config, most: int) -> int:
    """How many trainings run at once; one that never fits is left to say so itself."""
    bundles = of_training(config, config.cluster.most_workers)
    return max(1, abreast(bundles, min(most, config.cluster.trainings or most)))


def _records(one: Asked, last: str) -> dict[str, Record]:
    return {name: result.record for name, result in run(one.config, last).stages.items()}


def _pooled(asked: Sequence[Asked], last: str, actors: int, what: str) -> Iterator[tuple[int, dict[str, Record]]]:
    node = ray.get_runtime_context().get_node_id()
    room = Room(actors, 0.0, 0.0, asked[0].config.cluster.start_timeout_s, node)
    with _heard() as lines:
        for place, records in pooled(partial(_driver, lines, last), asked, room, what):
            if isinstance(records, StageError):
                raise records
            log.info("%s: %s is done", what, asked[place].name)
            yield place, records


def _driver(lines: Queue, last: str) -> Callable[[Asked], dict[str, Record]]:
    """What brings a run up to date, in a process that has nothing else to do."""
    logger, handler = logging.getLogger("pipeline"), _Sent(lines)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)

    def work(one: Asked) -> dict[str, Record]:
        handler.name = one.name
        return _records(one, last)

    return work


class _Sent(logging.Handler):
    """Hands log lines to whoever listens."""

    def __init__(self, lines: Queue) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line, under the run's name."""
        try:
            self._lines.put((record.levelno, f"{self.name}: {record.getMessage()}"))
        except RayError:
            self.handleError(record)


@contextmanager
def _heard() -> Iterator[Queue]:
    """A queue whose lines are logged here."""
    lines, over = Queue(actor_options={"num_cpus": 0}), threading.Event()

    def listen() -> None:
        while True:
            last = over.is_set()  # looked at first: what was sent before is still there
            try:
                log.log(*lines.get(timeout=_POLL_S))
            except Empty:
                if last:
                    return
            except RayError:  # Ray is gone, which whoever waits for results is told
                return

    thread = threading.Thread(target=listen, name="side-by-side-log", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        over.set()
        thread.join()
        lines.shutdown()
