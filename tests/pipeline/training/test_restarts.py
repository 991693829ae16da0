from __future__ import annotations

import re
from collections.abc import Mapping
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
from pipeline.tracking.tracker import Tracker
from pipeline.training.restarts import Failures, Room, Tally
from tests.pipeline.training.test_saver import _save

_LOST = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:29400")
_AWAY = StorageError("cannot write s3://b/x: the endpoint cannot be reached")


_ADVICE = "where memory is short, lower model.select.chunk=7"


class _Told(Tracker):
    """What a run would be told; no MLflow."""

    def log_event(self, run_id: str, tags: Mapping[str, str], metrics: Mapping[str, float], step: int) -> None:
        told.append((tags["restart"], dict(metrics), step))


told: list[tuple[str, dict[str, float], int]] = []


def _failures(folder: Path, step: int, allowed: int) -> Failures:
    told.clear()
    return Failures(Tally(_Told("", ""), "r", str(folder), step, allowed), _ADVICE)


@pytest.mark.parametrize("failures", [[_LOST], [_AWAY], [_LOST, _AWAY], [SlideError("source", "s.svs: no answer")]])
def test_ray_tries_again_where_a_restart_may_help(failures: list[Exception], tmp_path: Path) -> None:
    _failures(tmp_path, 0, 1).after_exception(None, dict(enumerate(failures)))


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
        _failures(tmp_path, 0, 9).after_exception(None, failures)
    assert caught.value is error


def test_failures_count_from_the_last_checkpoint_on(tmp_path: Path) -> None:
    _save(tmp_path, 4)
    failures = _failures(tmp_path, 4, 2)
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
    assert [metrics["failures_without_checkpoint"] for _, metrics, _ in told] == [1, 2] * 4
    assert told[-1][0].startswith("restart 8, after step 7: the workers failed ([gloo] Connection closed by peer [")
    assert told[-1][0].endswith("failure 2 of 2 allowed before the next checkpoint")
    assert told[-1][1:] == ({"restarts": 8, "failures_without_checkpoint": 2}, 7)


def test_a_storage_that_is_away_counts_as_no_progress(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    failures = _failures(tmp_path / "file" / "run", 0, 1)
    failures.after_exception(None, {0: _AWAY})
    assert "the checkpoints cannot be looked at (cannot list" in caplog.text
    with pytest.raises(StorageError):
        failures.after_exception(None, {0: _AWAY})


def test_a_node_that_was_taken_away_is_no_failure(tmp_path: Path) -> None:
    """Its peers lose their connection, and Ray tells of both at every look until the time of the notice is over."""
    died = ActorDiedError()
    died._preempted = True
    failures = _failures(tmp_path, 0, 0)
    for _ in range(3):
        failures.after_exception(None, {0: _LOST, 1: WorkerHealthCheckFailedError("worker 1 is dead", died)})
    assert len(told) == 1
    assert "restart 1, after step 0: a worker's node was taken away" in told[0][0]


def test_a_worker_that_was_ended_for_want_of_memory_says_what_to_lower(tmp_path: Path) -> None:
    killed = ActorDiedError()
    killed.error_msg = (
        "The actor died.\n1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: "
        "10.0.0.2, ID: 78) was 30.81GB used / 32.00GB limit (0.96)\nTo see more"
    )
    failures = _failures(tmp_path, 0, 1)
    dead = {0: _LOST, 1: WorkerHealthCheckFailedError("worker 1 is dead", killed)}
    failures.after_exception(None, dead)
    said = "Ray ended its process, for its node ran out of memory (30.81GB used / 32.00GB limit)"
    assert said in told[0][0]
    assert told[0][0].endswith(f"; {_ADVICE}")
    with pytest.raises(StageError, match=rf"{re.escape(said)}\); {_ADVICE}; or mend that, or raise cluster.max_fail"):
        failures.after_exception(None, dead)


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
