from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.bags.patients import OneSlide, by_patient
from pipeline.config.recipe import ClusterConfig
from pipeline.errors import StageError, TrackingError
from pipeline.model.checkpoint import Progress
from pipeline.model.folder import WEIGHTS
from pipeline.storage import files
from pipeline.storage.lease import Claim, Lease
from pipeline.storage.tree import upload_tree
from pipeline.store.patches import StoredSlide
from pipeline.tracking.tracker import Tracker, open_tracking
from pipeline.training.loop import StepDone
from pipeline.training.ranks import Ranks
from pipeline.training.saver import newest
from pipeline.training.session import Job, _advanced, _looks, _peak_bytes, run_session
from tests.pipeline.small import small_config, store_slides, write_cohort
from tests.pipeline.training.test_validation import Together
from tests.s3 import serve_s3

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, mlflow_uri: str) -> Job:
    """Twelve epochs of three steps on seven slides, two of them to look at; winners serve three visits."""
    folder = tmp_path_factory.mktemp("session")
    config = small_config(
        train={"epochs": 12, "batch_size": 2, "warmup_epochs": 1, "validate_every": 2, "reselect_every": 3},
        cluster={"cpus_per_worker": 1, "checkpoint_steps": 1},
    )
    slides = store_slides(write_cohort(folder, ["no", "yes"] * 3 + ["no"]), folder / "store", config)
    tracker = open_tracking(mlflow_uri, "session", str(folder / "artifacts"))
    return Job(config, tuple(slides[:5]), tuple(slides[5:]), "plan", str(folder / "run"), tracker, "")


def _started(job: Job, folder: Path) -> Job:
    return replace(job, folder=str(folder), run_id=job.tracker.start_run("train"))


def _run(job: Job) -> Progress:
    found = newest(job.folder)
    return run_session(job, Ranks(), torch.device("cpu"), found.name if found else None)


@pytest.mark.slow
def test_ten_kills_change_neither_weights_nor_metrics(job: Job, tmp_path: Path) -> None:
    jobs = [_started(job, tmp_path / name) for name in ("whole", "killed")]
    for one, kills in zip(jobs, (0, 10), strict=True):
        (tmp_path / "job").write_bytes(pickle.dumps(one))
        command = [sys.executable, "-m", "tests.pipeline.training.killed", str(tmp_path / "job"), str(kills), "7"]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    whole, killed = (newest(one.folder) for one in jobs)
    assert whole is not None
    assert killed is not None
    assert (killed.name, killed.epoch, killed.is_last) == ("step-00000036", 12, True)
    expected, found = (load_file(Path(one.folder) / killed.name / WEIGHTS) for one in jobs)
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    client = job.tracker.client
    for key in ("loss", "lr", "train_loss", "val_loss", "share_read", "winners_changed"):
        before, after = (client.get_metric_history(one.run_id, key) for one in jobs)
        assert [(m.step, m.value) for m in before] == sorted((m.step, m.value) for m in after), key
        assert before, key


class _Stop(Exception):
    pass


def _stop_after(steps: int) -> Callable[[], bool]:
    """To be asked after every step."""
    left = iter(range(steps - 1, -1, -1))

    def asked() -> bool:
        if next(left) == 0:
            raise _Stop
        return False

    return asked


def _short(job: Job, folder: Path, **train: object) -> Job:
    settings = {"epochs": 2, "batch_size": 2, "warmup_epochs": 1, "validate_every": 2, **train}
    config = small_config(train=settings, cluster={"cpus_per_worker": 1, "checkpoint_steps": 1})
    return _started(replace(job, config=config), folder)


def test_patients_of_several_slides_are_trained_on_and_looked_at_as_one_bag_each(job: Job, tmp_path: Path) -> None:
    """Every step takes patients; augmented patches of all their slides are scored and trained on."""
    train, val = (
        by_patient([(slide, source) for slide, source in part if isinstance(source, OneSlide)])
        for part in (job.train, job.val)
    )
    assert [len(source.slides) for _, source in train] == [2, 2, 1]
    patients = replace(job, train=tuple(train), val=tuple(val))
    short = _short(patients, tmp_path / "patients")
    done = _run(pickle.loads(pickle.dumps(short)))
    assert (done.step, done.epoch, done.is_last) == (4, 2, True)
    looks = job.tracker.client.get_metric_history(short.run_id, "val_loss")
    assert len(looks) == 1


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_that_stops_within_an_epoch_goes_on_as_if_it_had_not(every: int, job: Job, tmp_path: Path) -> None:
    whole, stopped = (_short(job, tmp_path / name, reselect_every=every) for name in ("whole", "stopped"))
    expected = _run(whole)
    with pytest.raises(_Stop):
        run_session(stopped, Ranks(), torch.device("cpu"), None, _stop_after(3))
    between = newest(stopped.folder)
    assert between is not None
    assert between.step in (1, 2)  # a step is passed over while the one before it is being written
    assert (between.epoch, between.step_in_epoch, between.is_last) == (0, between.step, False)
    assert between.tally["steps"] == between.step
    found = _run(stopped)
    steady = ("epoch", "train_loss", "val_loss", "share_read")
    assert {key: found.metrics[key] for key in steady} == {key: expected.metrics[key] for key in steady}
    assert (found.metrics["share_read"] < 1) == (every > 1)
    weights = [load_file(Path(one.folder) / found.name / WEIGHTS) for one in (whole, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    steps = [metric.step for metric in job.tracker.client.get_metric_history(stopped.run_id, "loss")]
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    kept = sorted(path.name for path in Path(stopped.folder).iterdir())
    assert kept[-1] == "step-00000006"
    assert len(kept) == 2


def test_a_notice_to_leave_saves_at_once(job: Job, tmp_path: Path) -> None:
    rare = _short(job, tmp_path)
    rare = replace(rare, config=rare.config.model_copy(update={"cluster": ClusterConfig(cpus_per_worker=1)}))
    seen: list[Progress | None] = []

    def is_leaving() -> bool:
        seen.append(newest(rare.folder))
        if len(seen) == 3:
            raise _Stop
        return True

    with pytest.raises(_Stop):
        run_session(rare, Ranks(), torch.device("cpu"), None, is_leaving)
    assert [progress and progress.step for progress in seen] == [None, 1, 1]


def test_patience_ends_the_run_and_the_best_checkpoint_stays(job: Job, tmp_path: Path) -> None:
    hopeless = _short(job, tmp_path, epochs=9, patience=2, validate_every=1, lr=1e-12, weight_decay=0)
    last = _run(hopeless)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert last.is_last
    assert last.epoch < 9
    assert last.best in kept
    assert len(kept) <= 3
    assert last.metrics["looks_since_best"] == 2


def test_a_run_that_patience_ended_is_over_after_a_restart_too_and_sends_what_was_left(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker is lost with MLflow away, after the last checkpoint: Ray starts it again."""
    few = replace(job, train=job.train[:2])  # a step an epoch
    stopped = _short(few, tmp_path, epochs=9, patience=1, validate_every=1, lr=1e-12, weight_decay=0)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.journal._PERIOD_S", 60)
        patch.setattr(Tracker, "log_rows", _away)
        with pytest.raises(TrackingError, match="away"):
            _run(stopped)
    found = newest(stopped.folder)
    assert found is not None
    assert found.is_last
    assert found.epoch < 9
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert replace(_run(stopped), unsent=[]) == replace(found, unsent=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    steps = [metric.step for metric in job.tracker.client.get_metric_history(stopped.run_id, "loss")]
    assert sorted(steps) == list(range(1, found.step + 1))


def _away(*_: object) -> None:
    raise TrackingError("MLflow is away")


def test_a_run_that_another_driver_has_taken_over_writes_nothing_and_ends(job: Job, tmp_path: Path) -> None:
    claim = Claim("theirs", "node-7", "boot", 77, 1e9, "2026-01-02T03:04:05+00:00")
    files.write_json(str(tmp_path / "lease"), asdict(claim))
    lost = replace(_short(job, tmp_path / "run"), lease=Lease(str(tmp_path / "lease"), "mine"))
    with pytest.raises(StageError, match="process 77 on node-7.* has taken this work over"):
        _run(lost)
    assert not (tmp_path / "run").exists()


_RANDOM = {
    "encoder": {"stages": 2},
    "aggregator": {"heads": 2, "key_dim": 4, "hidden_dim": 16},
    "select": {"memory": 5, "chunk": 7, "mode": "random"},
}


@pytest.mark.parametrize(("model", "words"), [({}, "diverged, of the v"), (_RANDOM, "the logits of the v")])
def test_weights_that_the_last_step_of_an_epoch_broke_are_named_and_not_saved(
    model: dict[str, object], words: str, job: Job, tmp_path: Path
) -> None:
    """The loss and the gradients were still finite."""
    few = replace(job, train=job.train[:2])
    broken = _short(few, tmp_path, epochs=3, lr=1e30, clip_norm=None, warmup_epochs=0, validate_every=1)
    broken = replace(
        broken, config=small_config(**{**broken.config.model_dump(), **({"model": model} if model else {})})
    )
    with pytest.raises(
        StageError, match=rf"{words}alidation slide s\d.* after step 1 \(epoch 1, lr 1e\+30\); lower train"
    ):
        _run(broken)
    assert not list(tmp_path.iterdir())


def test_running_out_of_memory_at_a_look_says_what_to_lower(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: object) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr("pipeline.training.session.predict_bag", greedy)
    with pytest.raises(StageError, match="out of memory in the validation .* lower train.score_batch"):
        _run(_short(replace(job, train=job.train[:2]), tmp_path, validate_every=1))


@pytest.mark.timeout(30)
def test_peak_memory_is_that_of_the_largest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = threading.local()
    monkeypatch.setattr("pipeline.training.session.peak_resident_bytes", lambda: sizes.mine)

    def work(ranks: Ranks) -> float:
        sizes.mine = (5e8, 7e8, 6e8)[ranks.rank]
        return _peak_bytes(ranks, torch.device("cpu"))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, Together(3).ranks)) == [7e8] * 3


def test_memory_beyond_what_was_tried_is_told_once(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    peaks = iter([100e6, 109e6, 111e6, 150e6])  # after step 1, and at the end of each epoch
    monkeypatch.setattr("pipeline.training.session._peak_bytes", lambda *_: next(peaks))
    last = _run(replace(_short(replace(job, train=job.train[:2]), tmp_path, epochs=3), val=()))
    assert (last.metrics["peak_memory_mb"], last.metrics["memory_bound_mb"]) == (150, 100)
    told = [record.getMessage() for record in caplog.records if "largest slides had been tried" in record.getMessage()]
    assert len(told) == 1
    assert "has used 111 MB, and 100 MB when" in told[0]


def test_the_last_epoch_is_always_looked_at() -> None:
    assert [epoch for epoch in range(1, 8) if _looks(epoch, 7, 3)] == [3, 6, 7]


def test_epoch_metrics_average_losses_and_count_patches() -> None:
    first = StepDone(
        4, 9, last_of_epoch=False, loss=1.0, lr=0.1, slides=2, patches=300, read=200, seconds=2.0, waited=1.0
    )
    last = replace(first, step=10, last_of_epoch=True, loss=0.5, patches=100, read=100, waited=0.0, changed=(0.5, 0.0))
    between = _advanced(Progress(4, 8, "plan"), first, 5)
    assert (between.epoch, between.step, between.step_in_epoch, between.metrics) == (4, 9, 1, {})
    done = _advanced(between, last, 5)
    assert (done.epoch, done.step, done.step_in_epoch, done.tally, done.is_last) == (5, 10, 0, {}, True)
    expected = {"epoch": 5.0, "train_loss": 0.75, "patches_per_s": 75.0, "device_wait": 0.25, "epoch_s": 4.0}
    expected |= {"share_read": 0.75, "train_winners_changed": 0.25}
    assert {key: done.metrics[key] for key in expected} == expected


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("away_s", [0.5, pytest.param(60.0, marks=pytest.mark.nightly)])
def test_a_storage_that_goes_away_is_waited_for(
    away_s: float, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times shortly, the first time before anything is read; or a minute, after the first checkpoint."""
    with serve_s3(tmp_path / "s3") as server:
        for name, value in {**server.env, "AWS_MAX_ATTEMPTS": "24"}.items():  # as `train` gives its workers
            monkeypatch.setenv(name, value)
        port = int(server.endpoint.rpartition(":")[2])
        bucket = server.bucket("bucket")
        config = _short(job, tmp_path).config
        slides = tuple(
            (slide, replace(source, uri=f"{bucket}/{source.key}"))
            for slide, source in job.train
            if isinstance(source, StoredSlide)
        )
        for (_, here), (_, there) in zip(job.train, slides, strict=True):
            assert isinstance(here, StoredSlide)
            upload_tree(Path(here.uri), there.uri)
    started = replace(job, config=config, train=slides, val=(), folder=f"{bucket}/run")
    started = replace(started, run_id=job.tracker.start_run("train"))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_session, started, Ranks(), torch.device("cpu"), None)
        if away_s > 1:
            with serve_s3(tmp_path / "s3", port):
                while not list(tmp_path.glob("s3/bucket/run/*/checkpoint.json")):
                    time.sleep(0.01)
            time.sleep(away_s)
            assert not running.done()
        else:
            for _ in range(3):
                time.sleep(away_s)
                with serve_s3(tmp_path / "s3", port):
                    time.sleep(0.5)
        with serve_s3(tmp_path / "s3", port):
            last = running.result(100)
            found = newest(started.folder)
    assert found is not None
    assert (found.name, found.is_last) == (last.name, True)
    whole = _short(job, tmp_path / "whole")
    whole = replace(whole, val=())
    _run(whole)
    expected = load_file(Path(whole.folder) / last.name / WEIGHTS)
    weights = load_file(tmp_path / "s3" / "bucket" / "run" / last.name / WEIGHTS)
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
