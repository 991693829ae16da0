from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError
from pipeline.jobs.record import NONCE, RECORD
from pipeline.jobs.submit import Order, _runtime_env, prepare
from tests.pipeline.jobs.head import REPO, Head, serve_head, wait_for

_SECRET = "PlantedPa55word"
_TOKEN = "PlantedTokenOfTheCluster0123456789"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    work.mkdir()
    (work / "code.py").write_text("x = 1\n")
    return work


def _config(root: Path, *overrides: str) -> Config:
    return load_config("demo", [f"storage.root={root}", *overrides], in_job=True)


def _stem(folder: Path, root: Path, *overrides: str) -> str:
    return prepare(_config(root, *overrides), ["run", "--config", "demo", *overrides], folder).stem


def test_the_same_order_has_the_same_name_and_any_other_another(folder: Path, tmp_path: Path) -> None:
    stem = _stem(folder, tmp_path)
    assert stem.startswith("demo-")
    assert _stem(folder, tmp_path) == stem
    assert _stem(folder, tmp_path, "deploy.address=http://elsewhere:1") == stem  # where it goes is not what it is
    others = {
        _stem(folder, tmp_path, "seed=1"),
        _stem(folder, tmp_path / "b"),
        _stem(folder, tmp_path, "train.lr=1e-5"),
    }
    (folder / "code.py").write_text("x = 2\n")
    assert len({stem, *others, _stem(folder, tmp_path)}) == 5


def test_variables_travel_by_name_and_never_a_secret(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3:8333")
    monkeypatch.setenv("HF_TOKEN", _SECRET)
    monkeypatch.setenv("INNOCENT", f"x{_SECRET}")
    monkeypatch.setenv("PROXY", f"http://u:{_SECRET}@proxy:1")
    order = prepare(_config(tmp_path, "deploy.env=[AWS_ENDPOINT_URL]"), ["run"], folder)
    sent = json.dumps(_runtime_env(order, order.job(1, "n")))
    assert '"AWS_ENDPOINT_URL": "http://s3:8333"' in sent
    assert _SECRET not in sent
    with pytest.raises(ConfigError) as caught:
        prepare(_config(tmp_path, "deploy.env=[INNOCENT,PROXY,ABSENT_ONE]"), ["run"], folder)
    assert "INNOCENT holds the value of HF_TOKEN" in str(caught.value)
    assert "PROXY holds" in str(caught.value)
    assert "ABSENT_ONE is not set here" in str(caught.value)
    assert _SECRET not in str(caught.value)
    with pytest.raises(ConfigError, match="HF_TOKEN: credentials by their name"):
        _config(tmp_path, "deploy.env=[HF_TOKEN]")


def test_a_job_knows_where_its_record_goes(folder: Path, tmp_path: Path) -> None:
    order = prepare(_config(tmp_path), ["run", "name=a b"], folder)
    job = order.job(2, "n")
    assert job.submission_id == f"{order.stem}-2"
    assert job.record == f"{tmp_path}/jobs/{order.stem}-2.json"
    env = _runtime_env(order, job)["env_vars"]
    assert isinstance(env, dict)
    assert (env[RECORD], env[NONCE], env["RAY_JOB_STOP_WAIT_TIME_S"]) == (job.record, "n", "60")
    assert order.entrypoint == "python -m pipeline run 'name=a b'"


def test_what_a_job_would_lose_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"storage\.root: 'runs/demo' is relative inside a Ray job"):
        load_config("demo", [], in_job=True)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """One that asks for a token, as wherever a port listens beyond loopback."""
    with serve_head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=_TOKEN) as made:
        yield made


def _submit(head: Head, *arguments: str) -> list[str]:
    program = [sys.executable, "-m", "pipeline", "submit", "--working-dir", str(REPO / "conf")]
    return [*program, *arguments, f"deploy.address={head.address}"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_command_s_own_code_comes_back_and_nothing_secret_stays(head: Head, tmp_path: Path) -> None:
    env = {**head.env, "DB_PASSWORD": _SECRET, "MLFLOW_TRACKING_PASSWORD": _SECRET}
    command = _submit(head, "--json", "plan", "--config", "demo", f"storage.root={tmp_path / 'root'}")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["code"], said["state"], said["source"]) == (0, "SUCCEEDED", "record")
    assert "is absent" in done.stderr  # the plan itself, out of the job's log

    absent = tmp_path / "absent.csv"
    command = _submit(head, "--json", "plan", f"cohort.uri={absent}", f"storage.root={tmp_path / 'root'}")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    said = json.loads(done.stdout)
    assert done.returncode == said["code"] == said["exit_code"] != 0
    assert (said["state"], said["source"]) == ("FAILED", "record")
    assert "absent.csv" in said["reason"]
    kept = wait_for(f"{head.address}/api/jobs/", 20, _TOKEN)
    assert said["submission_id"] in kept
    assert _SECRET not in kept
    assert _TOKEN not in kept


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("given", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "AnotherClusterS0123456789"}])
def test_without_the_cluster_s_token_nothing_is_begun(head: Head, tmp_path: Path, given: dict[str, str]) -> None:
    root = tmp_path / "root"
    command = _submit(head, "plan", "--config", "demo", f"storage.root={root}")
    done = subprocess.run(command, env={**head.env, **given}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 5
    assert f"{head.address} asks for a token" in done.stderr
    assert "copy the cluster's token to ~/.ray/auth_token" in done.stderr
    assert not root.exists()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(180)
def test_sigterm_stops_the_job_and_with_detach_leaves_it(head: Head, tmp_path: Path) -> None:
    slides = "cohort.demo.slides=800"  # a minute to write, for as long as both commands take to begin
    arguments = ("tile", "--config", "demo", f"storage.root={tmp_path / 'root'}", slides)
    codes: list[int] = []
    for options, told in ((("--json", "--detach"), "submitted as"), (("--json",), "follows the running")):
        command = _submit(head, *options, *arguments)
        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        with subprocess.Popen(command, env=head.env, stdout=null, stderr=pipe, text=True) as process:
            assert process.stderr is not None
            said = ""
            for text in process.stderr:
                said += text
                if "demo: writing" in text:  # out of the job's log: it is at work
                    break
            assert told in said
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
            codes.append(process.wait(100))
    assert codes == [143, 143]
    (record,) = (tmp_path / "root" / "jobs").glob("demo-*-1.json")
    kept = json.loads(record.read_text())
    assert kept["code"] == 143  # by the driver's own word: it was stopped, and had the time to say so
    assert "interrupted by SIGTERM" in kept["reason"]


def test_an_order_is_of_one_root(folder: Path, tmp_path: Path) -> None:
    order: Order = prepare(_config(tmp_path), ["run"], folder)
    assert replace(order, root="s3://b/p").job(1, "n").record == f"s3://b/p/jobs/{order.stem}-1.json"
