"""Following a job to its end: its lines, once each, and the exit code of its driver, whatever is lost on the way.

The stream of lines ends early on a busy head, and a cut connection may be silent for ever. So it is only a picture: the
job's state is asked for beside it until it is final, and the stream is opened anew, from where it broke off. A head
that is gone tells nothing more; the driver's own record does, if it lived.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import aiohttp
from ray.dashboard.modules.job.common import JobStatus
from ray.dashboard.modules.job.pydantic_models import JobDetails

from pipeline.jobs.client import AwayError, Client, asked
from pipeline.jobs.record import Result, read_result

log = logging.getLogger(__name__)

UNKNOWN = 7
"""Exit code where nobody knows how the driver ended."""
STOPPED = 143
"""Exit code of a job that was stopped and has not said how it ended: that of SIGTERM."""
STOP_WAIT_S = 60.0
"""That a driver has between SIGTERM and SIGKILL; Ray's own 3 s are too few to mark its runs as killed."""
_POLL_S = 2.0
_SILENT_S = 60.0  # without a line, after which the stream is opened anew: a cut connection says nothing
_LONGEST_S = 30.0  # between two attempts to reach a server that is away
_REST_S = 10.0  # for the last lines of a job that has ended


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    submission_id: str
    record: str
    """URI of how its driver ended."""
    nonce: str
    """What tells it from another one of the same id, on another cluster."""


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    submission_id: str
    code: int
    state: str
    """Ray's word for it, or LOST."""
    reason: str
    run_id: str | None
    source: str
    """Who says so: the driver's `record`, Ray, or nobody."""


class _Lines:
    """The job's log, shown as it comes; what was shown before a stream broke off is not shown again."""

    def __init__(self, client: Client, submission_id: str, show: Callable[[str], None]) -> None:
        self._client, self._id, self._show = client, submission_id, show
        self._shown = 0  # characters: the log only grows, and every stream begins at its first one
        self._lock, self._ending, self._cut = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(target=self._follow, name="job-lines", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show the rest of a job that has ended, as far as the server still has it."""
        self._ending.set()
        self._thread.join(_REST_S)  # a stream ends with its job, unless its connection is dead
        with self._lock:
            self._cut = True
        try:
            whole = asked(lambda: self._client.get_job_logs(self._id))
        except AwayError as away:
            log.warning("submit: the job's last lines cannot be had (%s)", away)
            return
        if rest := whole[self._shown :]:
            self._show(rest)

    def _follow(self) -> None:
        pause = 1.0
        while not self._ending.is_set():
            before = self._shown
            with suppress(RuntimeError, OSError, TimeoutError, aiohttp.ClientError):
                asyncio.run(self._stream())
            pause = 1.0 if self._shown > before else min(2 * pause, _LONGEST_S)
            self._ending.wait(pause)

    async def _stream(self) -> None:
        place, stream = 0, self._client.tail_job_logs(self._id)
        while True:
            try:
                text = await asyncio.wait_for(anext(stream), _SILENT_S)
            except StopAsyncIteration:
                return
            with self._lock:
                if self._cut:
                    return
                if new := text[max(0, self._shown - place) :]:
                    self._show(new)
                    self._shown += len(new)
            place += len(text)


def follow(client: Client, job: Job, show: Callable[[str], None], patience_s: float) -> Ended:
    """Wait for a job's end.

    Args:
        client: its server.
        job: which one.
        show: gets the job's lines, a few at a time, once each.
        patience_s: how long the server may be silent, while the job has written no record.
    """
    lines = _Lines(client, job.submission_id, show)
    answered, pause = time.monotonic(), _POLL_S
    while True:
        try:
            details = client.details(job.submission_id)
        except AwayError as away:
            if pause == _POLL_S:
                log.warning("submit: the job server does not answer (%s); it is asked again", away)
            silent = time.monotonic() - answered
            result, reason = read_result(job.record, job.nonce), f"the job server has been silent for {silent:.0f} s"
            if result is not None or silent >= patience_s:
                return _ended(job, None, result, reason)
            time.sleep(pause := min(1.5 * pause, _LONGEST_S, max(0.1, patience_s - silent)))
            continue
        answered, pause = time.monotonic(), _POLL_S
        if details is None:
            return _ended(job, None, read_result(job.record, job.nonce), "the cluster does not know it any more")
        if details.status.is_terminal():
            lines.close()
            return _ended(job, details, read_result(job.record, job.nonce), "")
        time.sleep(_POLL_S)


def stop(client: Client, job: Job) -> None:
    """End a job and wait until it has; its driver has a minute to say so in MLflow.

    Raises:
        AwayError: the server does not answer.
    """
    asked(lambda: client.stop_job(job.submission_id))
    deadline = time.monotonic() + STOP_WAIT_S + _LONGEST_S
    while time.monotonic() < deadline:
        details = client.details(job.submission_id)
        if details is None or details.status.is_terminal():
            return
        time.sleep(1.0)
    raise AwayError(f"it has not ended in {STOP_WAIT_S + _LONGEST_S:.0f} s")


def _ended(job: Job, details: JobDetails | None, result: Result | None, lost: str) -> Ended:
    state = "LOST" if details is None else details.status.value
    if result is not None:
        return Ended(job.submission_id, result.code, state, result.reason, result.run_id, "record")
    if details is None:
        reason = (
            f"{lost}, and the job has left no record: nobody knows how it ended. What it saved is kept; submit again"
        )
        return Ended(job.submission_id, UNKNOWN, state, reason, None, "nobody")
    return Ended(job.submission_id, code_of(details), state, details.message or "", None, "Ray")


def code_of(details: JobDetails) -> int:
    """The exit code that a final state stands for, where the driver has not written its own.

    A process that a signal ended has 128 and its number, as in a shell.
    """
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED
    code = details.driver_exit_code
    return 1 if code is None else 128 - code if code < 0 else code
