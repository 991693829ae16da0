"""When a training is given up: after failures with no step saved in between, or when its workers find no room.

Ray counts failures over the whole run and waits twice a minute for room. A run of weeks meets more failures than any
such number, and a node's replacement takes longer; so Ray is told to go on without end, and what stands here, which it
calls in its controller, ends the run by an error. That reaches the driver as a ControllerError.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from ray.exceptions import RayActorError
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

from pipeline.errors import PipelineError, ResourceError, StageError, StorageError
from pipeline.training.saver import newest

log = logging.getLogger(__name__)

_WAITING = (InitializingState, SchedulingState, ReschedulingState, RestartingState, ResizingState)


class Failures(UserCallback):
    """Ends a run whose workers met an error that a restart would only meet again, or fail again and again.

    Args:
        folder: of the run's checkpoints.
        step: of the newest one when the run begins.
        allowed: failures, one after another, without a newer checkpoint. Nodes that were taken away do not count.
    """

    def __init__(self, folder: str, step: int, allowed: int) -> None:
        self._folder, self._step, self._allowed = folder, step, allowed
        self._count = 0

    def after_exception(self, run_context: object, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raise a worker's error, where it is one of ours that cannot pass; those of its peers follow from it.

        And raise one of ours, or a StageError, when the workers failed once too often.
        """
        failures = list(worker_exceptions.values())
        ours = [failure for failure in failures if isinstance(failure, PipelineError)]  # others: a lost peer or machine
        error = next((failure for failure in ours if not failure.may_pass), None)
        if error is not None:
            raise error
        if any(_is_preempted(failure) for failure in failures):
            return
        step = self._saved()
        self._count = 1 if step > self._step else self._count + 1
        self._step = max(step, self._step)
        if self._count > self._allowed:
            said = "; ".join(dict.fromkeys(str(failure).strip().rpartition("\n")[2] for failure in failures))
            why = f"the workers failed {self._count} times without a checkpoint in between ({said})"
            raise next(iter(ours), StageError(f"train: {why}; mend that, or raise cluster.max_failures, and run again"))

    def _saved(self) -> int:
        """Steps of the newest checkpoint; a storage that is away shows none, and ends no run by itself."""
        try:
            found = newest(self._folder)
        except StorageError as away:
            log.warning("train: the checkpoints cannot be looked at (%s)", str(away).splitlines()[0])
            return self._step
        return 0 if found is None else found.step


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


def _is_preempted(failure: Exception) -> bool:
    """Whether a worker died because its node was taken away; Ray counts these apart, and so without end."""
    died = failure.health_check_failure if isinstance(failure, WorkerHealthCheckFailedError) else failure
    return isinstance(died, RayActorError) and bool(died.preempted)
