"""How far a long step is: bars with rate and time left on a terminal, else a line in the log now and then."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

CONSOLE = Console(stderr=True)
"""Where bars and, on a terminal, log lines go: one console, so that neither draws over the other."""

log = logging.getLogger(__name__)

_FIRST_S = 10.0  # until the first line, so that short steps have none
_GROWTH = 0.1  # of what a step has lasted, between two lines: some 20 lines an order of magnitude
_LONGEST_S = 300.0


def on_terminal() -> bool:
    """Whether a person watches."""
    return CONSOLE.file.isatty()  # sys.stderr is another one while bars are drawn


class Steps:
    """One step's count. Threads may share it."""

    def __init__(self, what: str, total: int, unit: str, start: int) -> None:
        self._what, self._total, self._unit, self._start, self._done = what, total, unit, start, start
        self._began = self._said = time.monotonic()
        self._lock = threading.Lock()
        self._bar: TaskID | None = None
        if on_terminal():
            self._bar = _bars.add(f"{what} ({unit})", total, start)

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        with self._lock:
            self._show(self._done + count, self._total)

    def to(self, done: int, total: int | None = None) -> None:
        """So many are done; of another total, where that is only known now."""
        with self._lock:
            self._show(done, self._total if total is None else total)

    def close(self) -> None:
        """No bar any more."""
        if self._bar is not None:
            _bars.remove(self._bar)

    def _show(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        if self._bar is not None:
            _bars.update(self._bar, done, total)
            return
        now = time.monotonic()
        if now - self._said < min(max(_FIRST_S, _GROWTH * (now - self._began)), _LONGEST_S):
            return
        self._said = now
        rate = (done - self._start) / (now - self._began)
        left = f", {_span((total - done) / rate)} left" if rate and done < total else ""
        log.info("%s: %s/%s %s, %s%s", self._what, f"{done:,}", f"{total:,}", self._unit, _rate(rate), left)


class _Bars:
    """All bars of the process, drawn together while there is one: rich draws one display at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shown: Progress | None = None

    def add(self, what: str, total: int, start: int) -> TaskID:
        with self._lock:
            if self._shown is None:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                rate = TextColumn("{task.fields[rate]}")
                self._shown = Progress(*columns, rate, console=CONSOLE, transient=True, redirect_stdout=False)
                self._shown.start()
            return self._shown.add_task(what, total=total, completed=start, rate="")

    def update(self, bar: TaskID, done: int, total: int) -> None:
        with self._lock:
            if self._shown is not None:
                speed = next((task.speed for task in self._shown.tasks if task.id == bar), None)
                self._shown.update(bar, completed=done, total=total, rate=_rate(speed) if speed else "")

    def remove(self, bar: TaskID) -> None:
        with self._lock:
            if self._shown is not None:
                self._shown.remove_task(bar)
                if not self._shown.tasks:
                    self._shown.stop()
                    self._shown = None


_bars = _Bars()


@contextmanager
def progress(what: str, total: int, unit: str, start: int = 0) -> Iterator[Steps]:
    """Show how far the block is.

    Args:
        what: is being done: the stage.
        total: of what there is to do.
        unit: what is counted, in the plural.
        start: done before.
    """
    steps = Steps(what, total, unit, start)
    try:
        yield steps
    finally:
        steps.close()


def _rate(a_second: float) -> str:
    return f"{a_second:,.3g} a second" if a_second < 1000 else f"{a_second:,.0f} a second"


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
