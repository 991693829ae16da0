from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.model.folder import WEIGHTS
from pipeline.tracking.tracker import open_tracking
from pipeline.training.ranks import Ranks
from pipeline.training.saver import newest
from pipeline.training.session import Job, run_session
from pipeline.training.worker import ASK_S, Notices
from tests.pipeline.small import small_config, store_slides, write_cohort
from tests.pipeline.training.test_validation import Together

REPO = Path(__file__).resolve().parents[3]


@pytest.mark.timeout(30)
def test_notices_are_asked_for_when_the_first_rank_s_clock_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all ranks at the same steps, whatever their own clocks say."""
    together, steps = Together(3), 12
    now = threading.local()
    monkeypatch.setattr("pipeline.training.worker.time.monotonic", lambda: now.seconds)

    def work(ranks: Ranks) -> list[bool]:
        now.seconds = 1000.0 * ranks.rank
        notices = Notices(ranks, torch.device("cpu"), lambda: True)
        answers = []
        for _ in range(steps):
            now.seconds += 2.0 if ranks.rank == 0 else 0.1 * ranks.rank
            answers.append(notices.seen())
        return answers

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, together.ranks))
    assert found == [[False, False, True] * 4] * 3
    assert ASK_S == 5  # with Ray's own 5 s a notice is seen within 10


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("how", "epochs"), [("killed", 20), ("asked", 90)])
def test_a_killed_worker_and_a_lost_node_do_not_change_the_weights(
    how: str, epochs: int, mlflow_uri: str, tmp_path: Path
) -> None:
    """Asked, they are lost by SIGTERM and after a notice, upon which the next step is saved and none is lost."""
    often = {"checkpoint_steps": 1} if how == "killed" else {}
    config = small_config(
        storage={"root": str(tmp_path)},
        train={"epochs": epochs, "batch_size": 2, "warmup_epochs": 1, "validate_every": 10, "threads": 1},
        cluster={"cpus_per_worker": 1, **often},
    )
    slides = store_slides(write_cohort(tmp_path, ["no", "yes"] * 3 + ["no"]), tmp_path / "store", config)
    tracker = open_tracking(mlflow_uri, "worker", str(tmp_path / "artifacts"))
    folder = str(tmp_path / "train" / "small-aa")
    harmed = Job(config, tuple(slides[:5]), tuple(slides[5:]), "", folder, tracker, tracker.start_run("train"))
    (tmp_path / "job").write_bytes(pickle.dumps(harmed))
    command = [sys.executable, "-m", "tests.pipeline.training.lost_node", str(tmp_path / "job"), how]
    environment = {**os.environ, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"{how} worker" in done.stdout
    assert "removed its node" in done.stdout
    if how == "asked":
        noticed, saved = (tmp_path / "train" / "notice").read_text().split()
        assert noticed == saved

    whole = replace(harmed, folder=str(tmp_path / "whole"), run_id=tracker.start_run("train"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the worker has
    last = run_session(whole, Ranks(), torch.device("cpu"), None)
    torch.set_num_threads(threads)
    found = newest(folder)
    assert found is not None
    assert (found.name, found.is_last) == (last.name, True)
    expected, weights = (load_file(Path(one) / last.name / WEIGHTS) for one in (whole.folder, folder))
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    steps = [metric.step for metric in tracker.client.get_metric_history(harmed.run_id, "loss")]
    assert sorted(steps) == list(range(1, 3 * epochs + 1))
