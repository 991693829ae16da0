"""When a training is given up: after failures with no step saved in between, or when its workers find no room.

Ray counts failures over the whole run and waits twice a minute for room. A run of weeks meets more failures than any
such number, and a node's replacement takes longer; so Ray is told to go on without end, and what stands here, which it
calls in its controller, ends the run by an error. That reaches the driver as a ControllerError. The controller itself
nobody starts again, so the driver does, and counts that among the failures.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ray.exceptions import ActorDiedError, RayActorError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    SchedulingState,
)

from pipeline import telemetry
from pipeline.cluster import ended, release
from pipeline.errors import PipelineError, ResourceError, StageError, StorageError, TrackingError
from pipeline.tracking.tracker import Tracker
from pipeline.training.saver import newest

log = logging.getLogger(__name__)

_MEMORY = "memory"  # in what is said of an end that want of memory may explain
_WAITING = (InitializingState, SchedulingState, ReschedulingState, RestartingState, ResizingState)


@dataclass
class Tally:
    """How often a run failed: in all, and since it last wrote a checkpoint. MLflow keeps both, and why.

    The driver has one, and hands a copy to each controller that it starts.
    """

    tracker: Tracker
    run_id: str
    folder: str
    """Of the run's checkpoints."""
    step: int
    """Of the newest checkpoint that is known."""
    allowed: int
    """Failures, one after another, without a newer checkpoint."""
    count: int = 0
    total: int = 0

    def failed(self) -> bool:
        """Count a failure; whether that is one more than is allowed."""
        step = self._saved()
        self.count = 1 if step > self.step else self.count + 1
        self.step = max(step, self.step)
        return self.count > self.allowed

    def restarted(self, why: str) -> str:
        """Tell MLflow of a restart, if it answers; the same in a line."""
        self.total += 1
        telemetry.count("ips_restarts_total")
        line = f"restart {self.total}, after step {self.step}: {why}"
        metrics = {"restarts": float(self.total), "failures_without_checkpoint": float(self.count)}
        try:
            self.tracker.log_event(self.run_id, {"restart": line}, metrics, self.step)
        except TrackingError as away:
            log.warning("train: MLflow was not told of %s (%s)", line, str(away).splitlines()[0])
        return line

    def learn(self) -> None:
        """Take over what the copy of a controller that died had counted, where MLflow knows it."""
        try:
            known, step = self.tracker.latest_metrics(self.run_id), self.tracker.latest_step(self.run_id, "restarts")
        except TrackingError as away:
            log.warning("train: restarts so far are not known (%s)", str(away).splitlines()[0])
            return
        if "restarts" in known:
            self.total, self.count = int(known["restarts"]), int(known["failures_without_checkpoint"])
            self.step = max(self.step, step)

    def _saved(self) -> int:
        """Steps of the newest checkpoint; a storage that is away shows none, and ends no run by itself."""
        try:
            found = newest(self.folder)
        except StorageError as away:
            log.warning("train: the checkpoints cannot be looked at (%s)", str(away).splitlines()[0])
            return self.step
        return 0 if found is None else found.step


class Failures(UserCallback):
    """Ends a run whose workers met an error that a restart would only meet again, or fail again and again.

    Args:
        tally: of the failures so far. Nodes that were taken away do not count.
        advice: what to do where memory is short.
    """

    def __init__(self, tally: Tally, advice: str) -> None:
        self._tally, self._advice = tally, advice
        self._left: tuple[int, str] | None = None

    def after_exception(self, run_context: object, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raise a worker's error, where it is one of ours that cannot pass; those of its peers follow from it.

        And raise one of ours, or a StageError, when the workers failed once too often.
        """
        failures = list(worker_exceptions.values())
        ours = [failure for failure in failures if isinstance(failure, PipelineError)]  # others: a lost peer or machine
        error = next((failure for failure in ours if not failure.may_pass), None)
        if error is not None:
            raise error
        said = "; ".join(dict.fromkeys(map(_said, failures)))
        if any(_is_preempted(failure) for failure in failures):
            if self._left != (self._tally.step, said):  # Ray tells of it at every look
                self._left = self._tally.step, said
                self._tally.restarted(f"a worker's node was taken away ({said})")
            return
        if self._tally.failed():
            raise next(iter(ours), _given_up("the workers", said, self._tally, self._advice))
        self._tally.restarted(_counted(f"the workers failed ({said})", self._tally, self._advice))


def controller_died(error: ActorDiedError, tally: Tally, advice: str) -> str:
    """Count the end of Ray Train's controller, which takes the workers with it; a line that says so.

    Raises:
        StageError: it was one failure too many.
    """
    said = ended(error) or str(error)
    release(str(error.actor_id))
    tally.learn()
    if tally.failed():
        raise _given_up("the workers or Ray Train's controller", said, tally, advice)
    return tally.restarted(_counted(f"Ray Train's controller ended ({said})", tally, advice))


def _counted(what: str, tally: Tally, advice: str) -> str:
    """What failed, how many failures are left, and what to do where memory is short."""
    short = f"; {advice}" if _MEMORY in what else ""
    return f"{what}, failure {tally.count} of {tally.allowed} allowed before the next checkpoint{short}"


def _given_up(who: str, said: str, tally: Tally, advice: str) -> StageError:
    """The error that ends a run."""
    remedy = f"{advice}; or mend that" if _MEMORY in said else "mend that"
    return StageError(
        f"train: {who} failed {tally.count} times without a checkpoint in between ({said}); {remedy}, or raise "
        "cluster.max_failures, and run again"
    )


class Room(ControllerCallback):
    """Ends a run whose workers wait for room for too long: a busy cluster, or a lost node that is not replaced.

    Args:
        minutes: that they may wait.
        needed: the workers and their resources, in words.
    """

    def __init__(self, minutes: float, needed: str) -> None:
        self._minutes, self._needed = minutes, needed
        self._since: float | None = None

    def after_controller_state_update(self, previous_state: object, current_state: object) -> None:
        """ResourceError when the workers do not run, and have not for so long."""
        if not isinstance(current_state, _WAITING):
            self._since = None
            return
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since >= 60 * self._minutes:
            reason = getattr(current_state, "training_failed_error", None)
            said = f" (Ray: {str(reason).partition('. ')[0]})" if reason else ""
            raise ResourceError(
                f"train: {self._needed} found no room on the cluster for {self._minutes:g} minutes{said}; what is "
                "saved is kept. Stop what else runs there, add nodes, lower cluster.workers or make it a range, or "
                "raise cluster.wait_minutes; then run again"
            )


def _said(failure: Exception) -> str:
    """A worker's failure in a line."""
    died = failure.health_check_failure if isinstance(failure, WorkerHealthCheckFailedError) else failure
    return ended(died) or str(failure).strip().rpartition("\n")[2]


def _is_preempted(failure: Exception) -> bool:
    """Whether a worker died because its node was taken away; Ray counts these apart, and so without end."""
    died = failure.health_check_failure if isinstance(failure, WorkerHealthCheckFailedError) else failure
    return isinstance(died, RayActorError) and bool(died.preempted)
