"""A process of its own for what a file may break: it dies alone, and is stopped when it takes too much.

C libraries abort, run for hours or fill the memory on files that were made to do that to them, and nothing in the
process that called them can stop it. So the work goes to a child that lives on from one piece of work to the next
(starting it takes 0.45 s of CPU time, handing it work 0.2 ms), and that its parent watches. Not a sandbox: what takes
over the child has the rights of its user.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

import psutil

from pipeline.errors import NodeError
from pipeline.telemetry import add, drain

WATCH_S = 0.05  # between two looks at a child: the system fills about 0.1 GiB in that time; a look takes 60 us
STALLED_S = 300.0  # without any CPU time; a storage that does not answer is given up within 240 s (`storage.files`)
WORDS = 300  # characters of a dead child's last line that are told
KILLED = frozenset({signal.SIGKILL, signal.SIGTERM})
"""Signals that come from others: the system where memory is short, or a person."""

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**24), "MALLOC_TRIM_THRESHOLD_": str(2**25)}
"""For glibc: memory of up to 32 MiB that is free is kept. By itself it gives arrays of 300 KB back to the system and
asks for them again, which was a quarter of the CPU time of finding tissue."""

_BOOT = "import sys; sys.path[:] = {path!r}; from pipeline.ingest.child import serve; serve({fd}, {modules!r})"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """What one piece of work may take."""

    seconds: float
    """Of CPU time."""
    gib: float
    """Of memory that the process holds at a time (its resident set)."""


class LimitError(Exception):
    """The work took more than it may, and its process was ended. The message says what it took."""


class DiedError(Exception):
    """The process ended by itself, or by another's hand."""

    def __init__(self, code: int, words: str) -> None:
        self.code = code
        """Exit status; a signal's number, negative."""
        self.words = words
        """The last line that it wrote, if any."""
        what = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        super().__init__(f"its process ended ({what})" + (f": {words}" if words else ""))

    @property
    def killed(self) -> bool:
        """Whether somebody else ended it."""
        return -self.code in KILLED


def run(work: Callable[[], Result], limits: Limits) -> Result:
    """What the work gives, done by a child process; what it raises is raised here.

    Args:
        work: picklable, with what it gives and raises.
        limits: of this piece of work.

    Raises:
        LimitError: it took more.
        DiedError: the child ended before it was done.
        NodeError: no child can be started here.
    """
    child = _take()
    try:
        done, found = child.do(pickle.dumps(work), limits)
    except BaseException:  # also an interrupt: what it does then is no longer wanted
        child.end()
        raise
    _give(child)
    if not done:
        raise found
    result: Result = found
    return result


def start() -> None:
    """Have a child get ready beside what is done until the next `run`, which would wait for it otherwise."""
    _give(_take())


class _Child:
    """One process, idle or at work."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self.environment, self._ready = _environment(), False
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  closed by `end`
        self._pipe, theirs = Pipe()
        code = _BOOT.format(path=self.environment[1], fd=theirs.fileno(), modules=modules)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,  # closes when this process ends, however it ends
                stdout=self._words,
                stderr=self._words,
                env={**MALLOC, **os.environ},
                pass_fds=[theirs.fileno()],
            )
        except OSError as error:
            raise NodeError(f"no process can be started to read slides: {error.strerror}; free memory") from error
        finally:
            theirs.close()

    def _get_ready(self) -> None:
        """Wait until it has loaded what it needs; NodeError where it cannot."""
        try:
            self._pipe.recv()
        except (EOFError, OSError) as error:
            raise NodeError(f"the process that reads slides does not start: {self._died()}") from error
        self._ready = True

    def do(self, work: bytes, limits: Limits) -> tuple[bool, Any]:
        """Whether the work is done, and what it gave or raised."""
        if not self._ready:
            self._get_ready()
        try:
            self._pipe.send_bytes(work)
            self._watch(limits)
            done, found, sums = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        self._pass_on_words()
        add(sums)
        return done, found

    def end(self) -> None:
        """Kill it, and free what it held."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        self._words.close()
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def _watch(self, limits: Limits) -> None:
        """Return when there is an answer, or the end of the process."""
        if self._pipe.poll(WATCH_S):
            return
        process = psutil.Process(self._process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            before = last = _cpu_seconds(process)  # of a long piece of work, so that a short one pays nothing
            moved = time.monotonic()
            while not self._pipe.poll(WATCH_S):
                now, gib = _cpu_seconds(process), process.memory_info().rss / 2**30
                seconds = now - before
                if now > last:
                    last, moved = now, time.monotonic()
                elif time.monotonic() - moved > STALLED_S:
                    raise LimitError(f"it has waited {STALLED_S:.0f} s for something that does not come, as of a pipe")
                if seconds > limits.seconds:
                    raise LimitError(f"{seconds:.0f} s of CPU time are not enough")
                if gib > limits.gib:
                    raise LimitError(f"{gib:.2f} GiB of memory are not enough")

    def _died(self) -> DiedError:
        code = self._process.wait()
        lines = self._pass_on_words().strip().splitlines()
        return DiedError(code, lines[-1][-WORDS:] if lines else "")

    def _pass_on_words(self) -> str:
        """What it wrote since the last time; libraries write to the descriptor, past any log."""
        if self._words.tell() == 0 and os.fstat(self._words.fileno()).st_size == 0:
            return ""
        self._words.seek(0)
        text = self._words.read().decode(errors="replace")
        self._words.seek(0)
        self._words.truncate()
        sys.stderr.write(text)
        return text


def serve(fd: int, modules: tuple[str, ...]) -> None:
    """What a child does: one piece of work after another, until its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both, and the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for module in modules:
        __import__(module)
    with Connection(fd) as pipe:
        pipe.send(None)
        while True:
            try:
                work = pipe.recv_bytes()
            except EOFError:
                return
            pipe.send_bytes(_done(work))


def _done(work: bytes) -> bytes:
    try:
        return pickle.dumps((True, pickle.loads(work)(), drain()))
    except Exception as error:
        return pickle.dumps((False, error, drain()))


def _end_with_parent() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _environment() -> tuple[dict[str, str], list[str]]:
    """What a child inherits once: credentials and the like may change, and then it is not for the next work."""
    return dict(os.environ), [os.path.abspath(place) for place in sys.path]  # noqa: PTH100  "" is the folder at hand


_MODULES = ("pipeline.ingest.tiler",)
_idle: list[_Child] = []
_lock = threading.Lock()


def _take() -> _Child:
    """An idle child, or a new one: as many as there are threads that have work."""
    environment = _environment()
    with _lock:
        while _idle:
            child = _idle.pop()
            if child.environment == environment and child.alive:
                return child
            child.end()
    return _Child(_MODULES)


def _give(child: _Child) -> None:
    with _lock:
        _idle.append(child)


@atexit.register
def _end_all() -> None:
    with _lock:
        while _idle:
            _idle.pop().end()


os.register_at_fork(after_in_child=_idle.clear)  # they are the parent's
