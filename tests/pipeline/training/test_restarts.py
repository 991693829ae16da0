from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

from pipeline.errors import (
    ConfigError,
    DamagedError,
    PipelineError,
    ResourceError,
    SlideError,
    StageError,
    StorageError,
)
from pipeline.training.restarts import Failures, Room
from tests.pipeline.training.test_saver import _save

_LOST = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:29400")
_AWAY = StorageError("cannot write s3://b/x: the endpoint cannot be reached")


@pytest.mark.parametrize("failures", [[_LOST], [_AWAY], [_LOST, _AWAY], [SlideError("source", "s.svs: no answer")]])
def test_ray_tries_again_where_a_restart_may_help(failures: list[Exception], tmp_path: Path) -> None:
    Failures(str(tmp_path), 0, 1).after_exception(None, dict(enumerate(failures)))


@pytest.mark.parametrize(
    "error",
    [
        StageError("the loss became nan at step 3"),
        StageError("train: out of memory in the selection"),
        DamagedError("part-00003.arrow: the store is damaged"),
        ConfigError("config", ["model.encoder.features: wrong"]),
        SlideError("changed", "s.svs: replaced"),
    ],
)
def test_what_would_only_happen_again_ends_the_run_whatever_its_peers_say(error: PipelineError, tmp_path: Path) -> None:
    failures = {0: _LOST, 1: error, 2: _AWAY}
    with pytest.raises(type(error)) as caught:
        Failures(str(tmp_path), 0, 9).after_exception(None, failures)
    assert caught.value is error


def test_failures_count_from_the_last_checkpoint_on(tmp_path: Path) -> None:
    _save(tmp_path, 4)
    failures = Failures(str(tmp_path), 4, 2)
    for step in (5, 6, 7):
        for _ in range(2):
            failures.after_exception(None, {0: _LOST})
        _save(tmp_path, step)
    for _ in range(2):
        failures.after_exception(None, {0: _LOST})
    with pytest.raises(
        StageError, match=r"failed 3 times without a checkpoint in between \(\[gloo\] Connection closed"
    ):
        failures.after_exception(None, {0: _LOST, 1: _LOST})
    with pytest.raises(StorageError) as caught:
        failures.after_exception(None, {0: _LOST, 1: _AWAY})
    assert caught.value is _AWAY


def test_a_storage_that_is_away_counts_as_no_progress(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    failures = Failures(str(tmp_path / "file" / "run"), 0, 1)
    failures.after_exception(None, {0: _AWAY})
    assert "the checkpoints cannot be looked at (cannot list" in caplog.text
    with pytest.raises(StorageError):
        failures.after_exception(None, {0: _AWAY})


def test_a_node_that_was_taken_away_is_no_failure(tmp_path: Path) -> None:
    """Its peers lose their connection, and Ray tells of both at every look until the time of the notice is over."""
    died = ActorDiedError()
    died._preempted = True
    failures = Failures(str(tmp_path), 0, 0)
    for _ in range(3):
        failures.after_exception(None, {0: _LOST, 1: WorkerHealthCheckFailedError("worker 1 is dead", died)})


def test_room_is_waited_for_from_when_the_workers_last_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("pipeline.training.restarts.time.monotonic", lambda: now[0])
    room = Room(2, "3 x (2 CPUs and 1 GPUs)")
    starting = SchedulingState(ResizeDecision(3, {"CPU": 2}))
    waiting = ReschedulingState(WorkerGroupStartupTimeoutError(3))
    for seconds, state in ((0, InitializingState()), (60, starting), (59, waiting), (1e6, RunningState())):
        now[0] += seconds
        room.after_controller_state_update(None, state)
    for seconds, state in ((0, starting), (119, waiting)):
        now[0] += seconds
        room.after_controller_state_update(None, state)
    now[0] += 1
    with pytest.raises(
        ResourceError, match=r"3 x \(2 CPUs and 1 GPUs\) found no room .* for 2 minutes \(Ray: The worker"
    ):
        room.after_controller_state_update(None, waiting)
