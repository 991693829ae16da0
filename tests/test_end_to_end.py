"""The whole way by its commands, in processes of their own: local files, S3, a Ray job, and interruptions.

What the tests of single modules do not cover: that the stages meet, that a second run does nothing, that what was
made in one process is found by the next, and that exit codes and MLflow's run states are those of the program.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from tests.s3 import serve_s3

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

REPO = Path(__file__).resolve().parents[1]
# Small enough for a minute: what is learnt does not matter here.
QUICK = (
    "train.epochs=2",
    "train.explore_epochs=0",
    "train.warmup_epochs=1",
    "model.select.memory=4",
    "evaluate.bootstrap=50",
    "cohort.demo.slides=24",
)


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", *arguments]


def _ips(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None, code: int = 0, within: float = 600) -> Any:
    """The program's JSON; fails with its log when it ends otherwise than expected, or not within so many seconds."""
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(
        _command(*arguments, "--json"),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=within,
    )
    assert done.returncode == code, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_from_nothing_to_a_champion_that_predicts(tmp_path: Path) -> None:
    first = _ips("run", "--config", "demo", *QUICK, cwd=tmp_path)
    root = tmp_path / "runs" / "demo"
    stages = first["stages"]
    assert {name: stage["outcome"] for name, stage in stages.items()} == dict.fromkeys(
        ("tile", "train", "evaluate", "register"), "done"
    )
    measured = stages["evaluate"]["metrics"]
    assert 2 * measured["test_auc"] == pytest.approx(measured["test_auc_lesion"] + measured["test_auc_burden"])
    page = Path(stages["evaluate"]["outputs"]["report"]).read_text()
    assert page.lstrip().lower().startswith("<!doctype html")
    assert "http://" not in page.replace("http://www.w3.org", "")

    client = MlflowClient(first["tracking_uri"])
    children = {name: client.get_run(stage["run_id"]) for name, stage in stages.items()}
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {first["run_id"]}
    losses = client.get_metric_history(stages["train"]["run_id"], "loss")
    assert [metric.step for metric in losses] == list(range(1, len(losses) + 1))
    version = client.get_model_version_by_alias("demo", "champion")
    assert version.tags["tiling_fingerprint"]
    (dataset,) = children["train"].inputs.dataset_inputs
    assert version.tags["cohort_digest"].startswith(dataset.dataset.digest)
    assert version.tags["slide_keys_digest"]

    again = _ips("run", "--config", "demo", *QUICK, cwd=tmp_path)
    assert again["outcome"] == "nothing to do"
    assert {stage["outcome"] for stage in again["stages"].values()} == {"skipped"}
    assert again["stages"]["evaluate"]["metrics"] == stages["evaluate"]["metrics"]

    changed = _ips("plan", "--config", "demo", *QUICK, "train.lr=1e-5", cwd=tmp_path)
    assert [(s["action"], s["why"]) for s in changed["stages"][:2]] == [
        ("skip", "done and unchanged"),
        ("run", "changed since the last time: recipe"),
    ]

    slides = sorted(str(path) for path in (root / "cohort" / "slides").iterdir())[:2]
    _ips("predict", "--model", "models:/demo@champion", "--tracking-uri", first["tracking_uri"], *slides, cwd=tmp_path)
    folders = list((tmp_path / "predictions" / "slides").iterdir())
    maps = [pq.read_table(folder / "attention.parquet")["attention"].to_pylist() for folder in folders]
    assert [round(sum(attention), 3) for attention in maps] == [1.0, 1.0]
    assert all((folder / "overlay.png").is_file() for folder in folders)


@pytest.mark.nightly
def test_a_first_cohort_as_a_spreadsheet_writes_it(tmp_path: Path) -> None:
    """Semicolons, UTF-16, Windows line ends, No and Yes, classes that YAML takes for truth values, a year as name."""
    _ips("demo", "d", "--slides", "12", cwd=tmp_path)
    rows = [line.split(",") for line in (tmp_path / "d" / "cohort.csv").read_text().splitlines()]
    place = rows[0].index("label")
    for row in rows[1:]:
        row[place] = {"0": "No", "1": "Yes"}[row[place]]
    text = "".join(";".join([*row, ""]) + "\r\n" for row in rows)
    (tmp_path / "d" / "mine.csv").write_bytes(text.encode("utf-16"))
    task = "tasks=[{name: lesion, column: label, classes: [no, yes]}]"
    given = ["cohort.uri=d/mine.csv", "cohort.demo=null", "name=2024", task]
    quick = [setting for setting in QUICK if not setting.startswith("cohort.")]
    done = _ips("run", "--config", "demo", *given, *quick, cwd=tmp_path)
    assert Path(done["root"]) == tmp_path / "runs" / "2024"
    assert done["stages"]["register"]["outcome"] == "done"
    measured = done["stages"]["evaluate"]["metrics"]
    assert measured["test_auc_low"] < measured["test_auc_high"]  # of a handful of patients, whatever was learned
    assert measured["test_accuracy_low"] < measured["test_accuracy_high"]


@pytest.mark.nightly
def test_streamed_slides_to_a_champion_while_a_second_run_of_the_recipe_is_refused(tmp_path: Path) -> None:
    streamed = ["run", "--config", "demo", *QUICK, "train.source=stream", "cluster.cpus_per_worker=1"]
    root = tmp_path / "runs" / "demo"
    command = [*_command(*streamed), "--json"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not list(root.glob("stages/train-*.lease")):
            assert running.poll() is None, running.communicate()[1][-4000:]
            time.sleep(0.05)
        refused = _ips(*streamed, cwd=tmp_path, code=1)
        said, log = running.communicate()
    assert running.returncode == 0, log[-4000:]
    assert f"process {running.pid} on {socket.gethostname()}, since " in refused["message"]
    first = json.loads(said)
    assert {stage["outcome"] for stage in first["stages"].values()} == {"done"}
    assert first["stages"]["train"]["metrics"]["epoch"] == 2
    assert len(list(root.rglob("*.arrow"))) == len(list(root.glob("patches/plans/*/packs/*.arrow"))) > 0
    assert all(json.loads(file.read_text())["free"] for file in root.glob("stages/*.lease"))
    client = MlflowClient(first["tracking_uri"])
    assert {client.get_run(stage["run_id"]).info.status for stage in first["stages"].values()} == {"FINISHED"}
    assert client.get_model_version_by_alias("demo", "champion")
    assert _ips(*streamed, cwd=tmp_path)["outcome"] == "nothing to do"


def test_everything_in_a_bucket(tmp_path: Path) -> None:
    with serve_s3(tmp_path / "s3") as server:
        bucket = server.bucket("hospital")
        cohort = f"cohort.uri={bucket}/in come=1, 2/cohort.csv"  # the demo is written there, like everything else
        arguments = ["--config", "demo", cohort, f"storage.root={bucket}/root", *QUICK]
        first = _ips("run", *arguments, cwd=tmp_path, env=server.env)
        assert {stage["outcome"] for stage in first["stages"].values()} == {"done"}
        checkpoint = first["stages"]["train"]["outputs"]["checkpoint"]
        assert checkpoint.startswith(f"{bucket}/root/train/")
        made = tmp_path / "s3" / "hospital" / "root"
        assert list(made.glob("patches/*/packs/*.arrow"))
        assert list(made.glob("train/*/step-*/weights.safetensors"))
        assert list(made.rglob("artifacts/**/report.html"))
        assert _ips("run", *arguments, cwd=tmp_path, env=server.env)["outcome"] == "nothing to do"
        slide = f"{bucket}/in come=1, 2/slides/demo-0003.tif"
        predict = ["predict", "--model", "models:/demo@champion", "--tracking-uri", first["tracking_uri"], slide]
        assert _ips(*predict, cwd=tmp_path, env=server.env)["failed"] == {}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """`ray start --head` on ports of its own; the environment in which to submit."""
    port, dashboard, client, agent = (_free_port() for _ in range(4))  # another head may hold the usual ones
    ray = str(Path(sys.executable).with_name("ray"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs run the `python` of the head's PATH
    environment = {
        **os.environ,
        "PATH": path,
        "RAY_AUTH_MODE": "disabled",
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    start = [ray, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", "--dashboard-host=127.0.0.1"]
    start += [f"--dashboard-port={dashboard}", "--object-store-memory=200000000"]
    start += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    without_address = {key: value for key, value in environment.items() if key != "RAY_ADDRESS"}
    # In the foreground and ended by its own process: `ray stop` would end every Ray on the machine.
    with subprocess.Popen(start, env=without_address, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as head:
        try:
            _wait_for(f"http://127.0.0.1:{dashboard}/api/version")
            yield environment
        finally:
            head.terminate()


def _wait_for(url: str) -> None:
    """Return when the URL answers; fail after a minute."""
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.5)
        else:
            return


def _training_worker() -> psutil.Process | None:
    """One of the processes that train below this one; None while there is none."""
    children = psutil.Process().children(recursive=True)
    return next((process for process in children if "RayTrainWorker" in "".join(_command_line(process))), None)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        line: list[str] = process.cmdline()
    except psutil.NoSuchProcess:  # it ended since it was listed
        return []
    return line


@pytest.mark.nightly  # three minutes: jobs, killed workers and champions have shorter tests of their own
def test_a_ray_job_of_two_workers_outlives_one_and_its_champion_predicts_outside(
    ray_head: dict[str, str], tmp_path: Path
) -> None:
    ray = str(Path(sys.executable).with_name("ray"))
    submit = [ray, "job", "submit", "--working-dir", str(REPO), "--"]
    two = ["cluster.workers=2", "cluster.cpus_per_worker=0.5", "cluster.checkpoint_steps=1"]
    place = f"storage.root={tmp_path / 'root'}"
    job = ["python", "-m", "pipeline", "run", "--config", "demo", place, *QUICK[1:], *two, "train.epochs=8"]
    with subprocess.Popen([*submit, *job], env=ray_head, stdout=subprocess.PIPE, text=True) as running:
        while not list(tmp_path.glob("root/train/*/*/checkpoint.json")):
            assert running.poll() is None, running.communicate()[0][-4000:]
            time.sleep(0.1)
        worker = _training_worker()
        assert worker is not None
        worker.kill()
        said = running.communicate()[0]
    assert running.returncode == 0, said[-4000:]
    assert "Nothing to do" not in said
    tracking = f"sqlite:///{tmp_path / 'root' / 'mlflow.db'}"
    client = MlflowClient(tracking)
    (experiment,) = client.search_experiments(filter_string="name = 'demo'")
    (trained,) = client.search_runs([experiment.experiment_id], "tags.stage = 'train'")
    assert trained.info.status == "FINISHED"
    steps = [metric.step for metric in client.get_metric_history(trained.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, len(steps) + 1))
    assert trained.data.metrics["epoch"] == 8

    again = subprocess.run([*submit, *job], env=ray_head, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout[-4000:]
    assert "Nothing to do" in again.stdout

    relative = [*job[:5], "demo", "storage.root=runs", *QUICK]
    refused = subprocess.run([*submit, *relative], env=ray_head, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "storage.root: 'runs' is relative inside a Ray job" in refused.stdout + refused.stderr

    slide = str(next((tmp_path / "root" / "cohort" / "slides").iterdir()))
    said = _ips("predict", "--model", "models:/demo@champion", "--tracking-uri", tracking, slide, cwd=tmp_path)
    assert said["failed"] == {}


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.nightly),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.nightly),
    ],
)
def test_an_interrupted_training_is_killed_in_mlflow_and_goes_on(tmp_path: Path, signum: int, code: int) -> None:
    many = [*QUICK[1:], "train.epochs=16"]
    command = _command("run", "--config", "demo", *many)
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "train: epoch" in line:
                running.send_signal(signum)
                break
        rest = running.stderr.read()
        assert running.wait(timeout=120) == code, rest
    root = tmp_path / "runs" / "demo"
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'demo'")
    before = {run.info.run_name: run.info for run in client.search_runs([experiment.experiment_id])}
    last = "RUNNING" if signum == signal.SIGKILL else "KILLED"  # the dead tell nobody
    assert {name: info.status for name, info in before.items()} == {"demo": last, "train": last, "tile": "FINISHED"}
    kept = sorted(path.parent.name for path in root.glob("train/*/*/checkpoint.json"))
    assert kept
    resumed = _ips("train", "--config", "demo", *many, cwd=tmp_path)
    ended = {name: client.get_run(info.run_id).info.status for name, info in before.items()}
    assert ended == {"demo": "KILLED", "train": "KILLED", "tile": "FINISHED"}
    again = client.get_run(resumed["stages"]["train"]["run_id"])
    assert again.data.tags["resumed_from_run"] == before["train"].run_id
    assert int(again.data.tags["resumed_after_step"]) >= int(kept[-1].removeprefix("step-"))
    steps = [
        {metric.step for metric in client.get_metric_history(run_id, "loss")}
        for run_id in (before["train"].run_id, again.info.run_id)
    ]
    # What the killed run had taken but not sent yet, the next one sends: their steps may overlap, none is lost.
    # It may also have taken its last step when the signal came; then the next one has none to take.
    assert steps[0] | steps[1] == set(range(1, max(steps[0] | steps[1]) + 1))
    assert min(steps[1], default=1) <= int(again.data.tags["resumed_after_step"]) + 1
    assert resumed["stages"]["train"]["metrics"]["epoch"] == 16
    if signum == signal.SIGKILL:
        (tmp_path / "undisturbed").mkdir()
        whole = _ips("train", "--config", "demo", *many, cwd=tmp_path / "undisturbed")
        places = [tmp_path / "undisturbed", tmp_path]
        weights = [
            (place / run["stages"]["train"]["outputs"]["weights"]).read_bytes()
            for place, run in zip(places, (whole, resumed), strict=True)
        ]
        assert hashlib.sha256(weights[0]).hexdigest() == hashlib.sha256(weights[1]).hexdigest()


@pytest.mark.nightly
def test_more_workers_than_the_cluster_has_end_with_5_within_a_minute(tmp_path: Path) -> None:
    few = ["cluster.start_timeout_s=2", "cluster.workers=64", *QUICK]
    _ips("tile", "--config", "demo", *QUICK, cwd=tmp_path)
    said = _ips("train", "--config", "demo", *few, cwd=tmp_path, code=5, within=60)
    assert "cluster.workers" in said["message"]
    said = _ips("train", "--config", "demo", "cluster.gpus_per_worker=1", *few[:1], *QUICK, cwd=tmp_path, code=5)
    assert "1 GPUs" in said["message"]
