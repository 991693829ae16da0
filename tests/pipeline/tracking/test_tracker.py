from __future__ import annotations

import pickle
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking.context import registry as context_registry
from PIL import Image

from pipeline.errors import Interrupted, StageError, TrackingError
from pipeline.tracking.tracker import Tracker, connect, flatten, open_tracking

# MLflow 3.17 on SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("art efacts")


@pytest.fixture(scope="module")
def tracker(mlflow_uri: str, artifacts: Path) -> Tracker:
    return open_tracking(mlflow_uri, "tracking", str(artifacts))


def test_artifacts_lie_where_they_were_asked_for(tracker: Tracker, artifacts: Path) -> None:
    run_id = tracker.start_run("stage")
    tracker.log_text(run_id, "<html>", "report.html")
    tracker.log_image(run_id, Image.new("RGB", (7, 5)), "patches", 3)

    root = artifacts / run_id / "artifacts"
    made = sorted(str(path.relative_to(root)) for path in root.rglob("*.*"))
    assert [name.partition("+timestamp")[0] for name in made] == 2 * ["images/patches+step+3"] + ["report.html"]


def test_all_lies_below_a_root_of_an_odd_name(tmp_path: Path) -> None:
    root = tmp_path / "a#x %zz% é;&=+@:[x]{x}'\"\\b"
    root.mkdir()
    tracker = open_tracking(f"sqlite:///{root}/mlflow.db", "odd", f"{root}/artifacts")
    with tracker.run("one") as run_id:
        tracker.log_text(run_id, "page", "report.html")
    assert [path.name for path in tmp_path.iterdir()] == [root.name]
    assert sorted(path.name for path in root.iterdir() if not path.name.startswith(".")) == ["artifacts", "mlflow.db"]
    assert len(list((root / "artifacts").rglob("report.html"))) == 1


def test_the_experiment_that_mlflow_makes_lies_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its artifacts would go to the working directory, which a Ray job throws away."""
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "job")
    made = open_tracking(f"sqlite:///{tmp_path}/mlflow.db", "x", str(tmp_path / "artifacts"))
    places = [one.artifact_location for one in made.client.search_experiments()]
    assert len(places) == 2
    assert all(place.startswith((tmp_path / "artifacts").as_uri()) for place in places), places
    assert list((tmp_path / "job").iterdir()) == []


def test_a_run_that_a_signal_ended_says_so(tracker: Tracker) -> None:
    with pytest.raises(KeyboardInterrupt), tracker.run("killed") as run_id:
        raise KeyboardInterrupt  # as it comes out of Ray's waits, without arguments
    said = tracker.client.get_run(run_id).data.tags["error"]
    assert said.startswith("KeyboardInterrupt: a signal ended it (Ctrl-C, SIGTERM, `ray job stop`)")


def test_opening_again_finds_the_same_experiment(tracker: Tracker) -> None:
    assert open_tracking(tracker.uri, "tracking", "/elsewhere") == tracker


def test_a_relative_sqlite_path_is_made_absolute(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(tracker.uri.removeprefix("sqlite:///"))
    with sqlite3.connect(source) as store, sqlite3.connect(tmp_path / "copy.db") as copy:
        store.backup(copy)
    store.close()
    copy.close()
    monkeypatch.chdir(tmp_path)
    assert open_tracking("sqlite:///copy.db", "tracking", "artifacts").uri == f"sqlite:///{tmp_path}/copy.db"


def test_runs_nest_and_end_as_the_block_ends(tracker: Tracker) -> None:
    with tracker.run("parent", tags={"git_sha": "abc"}) as parent, tracker.run("child", parent) as child:
        assert tracker.client.get_run(child).info.status == "RUNNING"
    run = tracker.client.get_run(child)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "child"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert tracker.client.get_run(parent).data.tags["git_sha"] == "abc"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StageError("loss is NaN"), "FAILED"),
        (Interrupted(signal.SIGTERM), "KILLED"),
        (KeyboardInterrupt("stop"), "KILLED"),
    ],
)
def test_a_run_that_raises_is_marked_and_the_error_goes_on(tracker: Tracker, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), tracker.run("stage") as run_id:
        raise error
    run = tracker.client.get_run(run_id)
    assert run.info.status == status
    assert run.data.tags["error"].startswith(type(error).__name__)


def test_the_error_of_the_block_wins_over_a_store_that_went_away(tmp_path: Path) -> None:
    gone = Tracker("http://127.0.0.1:9", "0")
    object.__setattr__(gone, "start_run", lambda *_: "r1")
    object.__setattr__(gone, "set_tags", _raise_tracking_error)
    with pytest.raises(StageError, match="first") as caught, gone.run("stage"):
        raise StageError("first")
    assert "r1 could not be marked FAILED" in caught.value.__notes__[0]


def _raise_tracking_error(*_: object) -> None:
    raise TrackingError("down")


def test_params_are_flat_and_long_values_are_cut(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")  # MLflow would cut them itself
    run_id = tracker.start_run("params")
    many = {f"p{i:03d}": i for i in range(250)}
    tracker.log_params(run_id, {"train": {"lr": 0.1, "mean": (1, 2)}, "tasks": [{"name": "a"}], "long": "x" * 9000})
    tracker.log_params(run_id, many)
    params = tracker.client.get_run(run_id).data.params
    assert params["train.lr"] == "0.1"
    assert params["train.mean"] == "[1, 2]"
    assert params["tasks.0.name"] == "a"
    assert params["long"] == "x" * 6000
    assert len(params) == 254


def test_flatten_of_nothing() -> None:
    assert list(flatten({"a": {}, "b": [], "c": None})) == [("b", "[]"), ("c", "null")]


def test_metrics_have_steps_and_the_latest_is_found(tracker: Tracker) -> None:
    run_id = tracker.start_run("metrics")
    assert tracker.latest_step(run_id, "loss") == -1
    for step in (0, 7, 3):
        tracker.log_metrics(run_id, {"loss": step / 10, "lr": 1.0}, step)
    assert tracker.latest_step(run_id, "loss") == 7
    assert [m.step for m in tracker.client.get_metric_history(run_id, "loss")] == [0, 7, 3]


def test_a_class_of_any_name_has_its_metric(tracker: Tracker) -> None:
    """MLflow refuses the whole batch for one name that it does not take."""
    run_id = tracker.start_run("stage")
    tracker.log_metrics(run_id, {"auc_of_3+4": 0.5, "auc_of_≥2%": 0.25, "auc_of_grün 1": 1.0})
    assert set(tracker.client.get_run(run_id).data.metrics) == {"auc_of_3_4", "auc_of__2_", "auc_of_grün 1"}


def test_a_cohort_is_a_dataset_of_the_run(tracker: Tracker) -> None:
    run_id = tracker.start_run("dataset")
    tracker.log_dataset(run_id, "camelyon", "d" * 64, "s3://b/cohort.csv", "training")
    (used,) = tracker.client.get_run(run_id).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("camelyon", "d" * 36)
    assert used.tags[0].value == "training"


def test_system_metrics_are_sampled(tracker: Tracker) -> None:
    run_id = tracker.start_run("system")
    with tracker.system_metrics(run_id, interval_s=0.2):
        while "system/cpu_utilization_percentage" not in tracker.client.get_run(run_id).data.metrics:
            time.sleep(0.1)  # the test's own time limit ends it


@pytest.mark.slow
def test_another_process_logs_into_the_run_and_leaves_it_running(tracker: Tracker) -> None:
    run_id = tracker.start_run("worker")
    code = (
        "import pickle, sys\n"
        f"tracker = pickle.loads({pickle.dumps(tracker)!r})\n"
        f"tracker.log_metrics({run_id!r}, {{'loss': 2.5}}, 4)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
    run = tracker.client.get_run(run_id)
    assert run.data.metrics == {"loss": 2.5}
    assert run.info.status == "RUNNING"


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_server_that_is_down_is_reported_soon() -> None:
    with pytest.raises(TrackingError, match=r"tracking\.uri"):
        open_tracking("http://127.0.0.1:9", "exp", "artifacts")


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_server_that_never_answers_is_reported_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TrackingError, match="mlflow server"):
        open_tracking(f"http://127.0.0.1:{silent.getsockname()[1]}", "exp", "artifacts")


def test_a_file_that_is_no_store_is_reported(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    with pytest.raises(TrackingError, match="mlflow db upgrade"):
        open_tracking(f"sqlite:///{tmp_path}/mlflow.db", "exp", "artifacts")
    with pytest.raises(TrackingError, match="its folder can be written"):
        open_tracking(f"sqlite:///{tmp_path}/mlflow.db/below/mlflow.db", "exp", "artifacts")


def test_a_deleted_experiment_is_reported(tracker: Tracker) -> None:
    other = open_tracking(tracker.uri, "deleted", "artifacts")
    other.client.delete_experiment(other.experiment_id)
    with pytest.raises(TrackingError, match="experiments restore"):
        open_tracking(tracker.uri, "deleted", "artifacts")


def test_connecting_makes_nothing(tracker: Tracker, tmp_path: Path) -> None:
    assert connect(tracker.uri).uri == tracker.uri
    with pytest.raises(TrackingError, match="does not exist"):
        connect(f"sqlite:///{tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def test_runs_of_a_killed_process_end_as_killed_with_their_parents(tracker: Tracker) -> None:
    parent = tracker.start_run("demo")
    child = tracker.start_run("train", parent, {"stage": "train", "fingerprint": "f1"})
    other = tracker.start_run("train", None, {"stage": "train", "fingerprint": "f2"})
    tracker.end_abandoned({"stage": "train", "fingerprint": "f1"})
    states = {run_id: tracker.client.get_run(run_id).info.status for run_id in (parent, child, other)}
    assert states == {parent: "KILLED", child: "KILLED", other: "RUNNING"}
    assert "its process was killed" in tracker.client.get_run(child).data.tags["error"]


def test_models_of_a_store_whose_experiments_are_gone_are_found(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = open_tracking(uri, "trained", str(tmp_path)).client
    client.create_registered_model("kept")
    for experiment in client.search_experiments():
        client.delete_experiment(experiment.experiment_id)
    assert client.search_experiments() == []
    assert [model.name for model in connect(uri).client.search_registered_models()] == ["kept"]


@pytest.mark.parametrize("opened", [connect, lambda uri: open_tracking(uri, "e", "artifacts")])
@pytest.mark.parametrize("uri", ["http://svc:Pa55@127.0.0.1:9", "postgresql://u:my Pa55@h/d", "svc:Pa55@h:5"])
def test_a_uri_with_a_password_is_refused_and_not_repeated(opened: Callable[[str], object], uri: str) -> None:
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        opened(uri)
    assert "Pa55" not in str(caught.value)


def test_tags_are_masked_those_of_git_too(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = "https://x-access-token:Pa55@github.com/a/b.git"
    monkeypatch.setattr("mlflow.tracking.context.git_context._resolve_git_info", lambda: {
        "mlflow.source.git.commit": "c0ffee", "mlflow.source.git.repoURL": remote,
    })  # fmt: skip
    for provider in context_registry._run_context_provider_registry:
        monkeypatch.setattr(provider, "_cache", {}, raising=False)
    with pytest.raises(ValueError, match="Pa55"), tracker.run("masked", tags={"image": remote}) as run_id:
        raise ValueError(f"cannot clone {remote}")
    tags = tracker.client.get_run(run_id).data.tags
    assert tags["mlflow.source.git.repoURL"] == "https://***@github.com/a/b.git"
    assert "Pa55" not in str(tags)
