"""Real fits on Ray Train, each of which costs about 12 seconds, so they are few and marked slow; and what ends one."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray.train import ControllerError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import InsufficientClusterResourcesError
from safetensors.torch import load_file

from pipeline.bags.sources import content_of
from pipeline.cohort.table import CohortSlide
from pipeline.config.recipe import Config
from pipeline.errors import ResourceError, StageError, StorageError
from pipeline.model.checkpoint import Progress, take_snapshot
from pipeline.model.folder import WEIGHTS, Seen, read_seen
from pipeline.storage.files import write_bytes
from pipeline.store.patches import StoredSlide
from pipeline.tracking.tracker import Row, Tracker, open_tracking
from pipeline.training.driver import Trained, _cause, _note_seen, _process_group, _Trainer, _worker_environment, train
from pipeline.training.plan import plan_digest
from pipeline.training.ranks import Ranks
from pipeline.training.saver import Saver, newest
from pipeline.training.session import Job, run_session
from pipeline.training.worker import train_worker
from tests.pipeline.small import small_config, store_slides, write_cohort

Slides = list[tuple[CohortSlide, StoredSlide]]


def _config(root: Path, workers: int = 1, **train_: object) -> Config:
    settings = {"epochs": 3, "batch_size": 3, "warmup_epochs": 1, "augment": False, **train_}
    cluster = {"workers": workers, "cpus_per_worker": 0.5, "start_timeout_s": 2, "max_failures": 0}
    return small_config(storage={"root": str(root), "patches": str(root / "patches")}, train=settings, cluster=cluster)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Slides:
    folder = tmp_path_factory.mktemp("cohort")
    return store_slides(write_cohort(folder, ["no", "yes"] * 3 + ["no"]), folder / "store", small_config())


@pytest.fixture(scope="module")
def tracker(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return open_tracking(mlflow_uri, "train", str(tmp_path_factory.mktemp("artifacts")))


def _train(config: Config, slides: Slides, tracker: Tracker, fingerprint: str = "aa") -> tuple[Trained, str]:
    run_id = tracker.start_run("train")
    return train(config, slides[:5], slides[5:], fingerprint, tracker, run_id), run_id


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_resumes_from_its_last_checkpoint_as_if_uninterrupted(
    ray_session: None, slides: Slides, tracker: Tracker, tmp_path: Path
) -> None:
    whole, run_id = _train(_config(tmp_path / "whole"), slides, tracker)
    history = tracker.client.get_metric_history(run_id, "loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4, 5, 6]
    assert whole.metrics["epoch"] == 3
    assert "val_auc_tumour" in whole.metrics

    again, run_id = _train(_config(tmp_path / "whole"), slides, tracker)
    assert again == whole
    assert tracker.client.get_metric_history(run_id, "loss") == []

    with pytest.raises(StageError, match="another plan"):
        train(_config(tmp_path / "whole"), slides[:4], slides[5:], "aa", tracker, tracker.start_run("train"))


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_weights_do_not_depend_on_the_cpus_that_a_worker_has(
    ray_session: None, slides: Slides, tracker: Tracker, tmp_path: Path
) -> None:
    found = []
    for cpus in (1, 2):
        config = _config(tmp_path / str(cpus))
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"cpus_per_worker": cpus})})
        found.append(load_file(Path(_train(config, slides, tracker)[0].checkpoint) / WEIGHTS))
    assert [name for name, value in found[0].items() if not torch.equal(value, found[1][name])] == []


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_train_on_every_slide_and_keep_equal_weights(
    ray_session: None, slides: Slides, tracker: Tracker, tmp_path: Path
) -> None:
    trained, run_id = _train(_config(tmp_path, workers=2), slides, tracker)
    assert len(tracker.client.get_metric_history(run_id, "loss")) == 6
    weights = load_file(Path(trained.checkpoint) / "weights.safetensors")
    assert all(torch.isfinite(value.float()).all() for value in weights.values())


@pytest.mark.slow
@pytest.mark.ray
def test_what_can_never_be_had_is_refused(ray_session: None, slides: Slides, tracker: Tracker, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"needs 16 x \(0.5 CPUs"):
        _train(_config(tmp_path, workers=16), slides, tracker)


def test_a_finished_run_whose_driver_died_sends_what_was_left_and_gives_the_best(
    slides: Slides, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.driver.require", lambda *_: None)  # no Ray: there is nothing to train
    earlier = tracker.start_run("train")
    rows: list[Row] = [(5, 1, {"loss": 0.2}), (6, 2, {"loss": 0.1}), (6, 3, {"epoch": 3.0, "train_loss": 0.15})]
    tracker.log_rows(earlier, rows[:1])  # it was killed before it learnt that this one had come through
    first = Progress(2, 4, plan_digest([], [], "aa"), {"epoch": 2.0, "val_loss": 0.3}, best="step-00000004")
    last = replace(first, epoch=3, step=6, metrics={"epoch": 3.0, "val_loss": 0.9}, is_last=True, run_id=earlier)
    net = torch.nn.Linear(2, 2)
    config = _config(tmp_path, keep_best=True)
    with Saver(str(tmp_path / "train" / "small-aa")) as saver:
        for progress in (first, replace(last, unsent=rows)):
            saver.save(take_snapshot(net, torch.optim.SGD(net.parameters()), config, progress))
    run_id = tracker.start_run("train")
    done = train(config, [], slides[5:], "aa", tracker, run_id)
    assert done == Trained(f"{tmp_path}/train/small-aa/step-00000004", first.metrics)
    assert [metric.step for metric in tracker.client.get_metric_history(run_id, "loss")] == [6]
    assert tracker.latest_metrics(run_id)["epoch"] == 3


def test_what_a_model_has_seen_is_told_unless_it_began_with_another_training(slides: Slides, tmp_path: Path) -> None:
    config = _config(tmp_path)
    storage = config.storage.model_copy(update={"patches": str(Path(slides[0][1].uri).parents[1])})
    _note_seen(config.model_copy(update={"storage": storage}), str(tmp_path / "own"), slides)
    seen = read_seen(tmp_path / "own")
    assert seen is not None
    assert {source.key for _, source in slides} | {content_of(source) for _, source in slides} == seen.slides
    assert seen.patients == {Seen.patient(slide.patient_id) for slide, _ in slides}
    _note_seen(_config(tmp_path, begins_with="champion.safetensors"), str(tmp_path / "warm"), slides)
    assert read_seen(tmp_path / "warm") is None


def test_ranks_wait_while_the_first_one_validates(tmp_path: Path) -> None:
    """Large slides take it hours; the default of 30 minutes would end the run, again and again."""
    group = _process_group(_config(tmp_path).cluster)
    assert (group.backend, group.timeout_s) == ("gloo", 24 * 3600)


@pytest.mark.slow
@pytest.mark.ray
def test_an_error_that_lasts_ends_the_run_at_once_and_one_that_may_pass_is_tried_again(
    ray_session: None, slides: Slides, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path, lr=1e30, clip_norm=None, warmup_epochs=0)
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"max_failures": 2})})
    begun = tmp_path / "begun"

    def diverges(loop_config: Mapping[str, Job]) -> Progress:
        begun.write_bytes(begun.read_bytes() + b"x" if begun.exists() else b"x")
        return train_worker(loop_config)

    def goes_away(loop_config: Mapping[str, Job]) -> Progress:
        begun.write_bytes(begun.read_bytes() + b"y")
        raise StorageError("cannot read s3://bucket/x: the endpoint cannot be reached")

    monkeypatch.setattr("pipeline.training.driver.train_worker", diverges)
    with pytest.raises(StageError, match=r"at step .* lower train.lr"):
        _train(config, slides, tracker, "bb")
    assert begun.read_text() == "x"
    monkeypatch.setattr("pipeline.training.driver.train_worker", goes_away)
    with pytest.raises(StorageError, match=r"^cannot read s3://bucket/x"):
        _train(config, slides, tracker, "bb")
    assert begun.read_text() == "xyyy"


def test_workers_ask_a_storage_that_is_away_for_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a write gives up: the pauses of the real client, not waited for."""
    environment = _worker_environment(1)
    with socket.socket() as taken:  # nobody answers there
        taken.bind(("127.0.0.1", 0))
        environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for name, value in {**environment, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pipeline.storage.s3.PATIENCE_S", 0)
    sleep = asyncio.sleep
    pauses: list[float] = []

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr("asyncio.sleep", noted)
    with pytest.raises(StorageError, match="cannot be reached"):
        write_bytes("s3://bucket/file", b"data")
    assert 180 < sum(pauses) < 600
    assert max(pauses) <= 15  # so soon it goes on once the storage is back


def test_what_ended_the_run_is_told_and_gives_the_exit_code() -> None:
    away = StorageError("cannot write s3://b/x: the endpoint cannot be reached")
    assert _cause(ControllerError(away)) is away
    never = _cause(ControllerError(InsufficientClusterResourcesError("Insufficient cluster resources")))
    assert (type(never), never.exit_code) == (ResourceError, 5)
    assert "Training failed due to controller error:\nno disk" in str(_cause(ControllerError(OSError("no disk"))))


def test_ray_still_asks_the_method_that_leaves_sigint_to_the_program() -> None:
    """Else Ctrl-C would wait for the controller; the end-to-end test with SIGINT is a nightly one."""
    assert "_register_sigint_handler" in vars(_Trainer)
    assert hasattr(TorchTrainer, "_register_sigint_handler")


@pytest.mark.slow
@pytest.mark.ray
def test_workers_that_find_no_room_on_a_busy_cluster_end_with_exit_code_5(
    ray_session: None, slides: Slides, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes the preflight, which looks at what nodes have, not at what is free."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    config = _config(tmp_path)
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"wait_minutes": 0.05})})
    others = [ray.remote(num_cpus=1)(_Busy).remote() for _ in range(2)]
    ray.get([other.ready.remote() for other in others])
    with pytest.raises(ResourceError, match=r"1 x \(0.5 CPUs and 0 GPUs\) found no room .* for 0.05 minutes"):
        _train(config, slides, tracker, "cc")
    for other in others:
        ray.kill(other)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_controller_that_is_killed_after_a_worker_is_started_anew_and_the_weights_are_the_same(
    ray_session: None, slides: Slides, tracker: Tracker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With workers that take every CPU, so that the new ones begin when the old ones are gone."""
    config = _config(tmp_path / "harmed", epochs=30, validate_every=30)
    often = {"checkpoint_steps": 1, "cpus_per_worker": 2, "max_failures": 1, "start_timeout_s": 30}
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update=often)})
    folder = f"{tmp_path}/harmed/train/small-aa"

    def harm() -> None:
        for step, name in ((6, "RayTrainWorker"), (14, "TrainController")):
            while (found := newest(folder)) is None or found.step < step:
                time.sleep(0.02)
            _process(name).kill()

    with ThreadPoolExecutor(1) as pool, caplog.at_level("INFO", "pipeline"):
        harming = pool.submit(harm)
        trained, run_id = _train(config, slides, tracker)
        harming.result()
    metrics, tags = tracker.latest(run_id)
    assert metrics["restarts"] == 2
    said = [record.message for record in caplog.records if "restart" in record.message]
    assert len(said) == 2, said
    who_failed = ("the workers failed", "Ray Train's controller ended")
    for number, (line, who) in enumerate(zip(said, who_failed, strict=True), 1):
        assert re.match(
            rf"train: restart {number}, after step \d+: {who} \(its process was killed, as the kernel", line
        )
        assert "failure 1 of 1 allowed" in line
        assert "lower model.select.chunk=7, model.select.memory=5 or train.batch_size=3" in line
    assert f"train: {tags['restart']}" == said[1]
    steps = [metric.step for metric in tracker.client.get_metric_history(run_id, "loss")]
    assert sorted(steps) == list(range(1, 61))

    job = Job(
        config, tuple(slides[:5]), tuple(slides[5:]), "", str(tmp_path / "whole"), tracker, tracker.start_run("w")
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(config.train.threads)
    last = run_session(job, Ranks(), torch.device("cpu"), None)
    torch.set_num_threads(threads)
    expected, weights = (load_file(Path(one) / WEIGHTS) for one in (f"{job.folder}/{last.name}", trained.checkpoint))
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_controller_that_dies_again_and_again_ends_the_training(
    ray_session: None, slides: Slides, tracker: Tracker, tmp_path: Path
) -> None:
    former = _running("TrainController")  # of the training before it, which may still be ending

    def harm() -> None:
        while (process := _running("TrainController")) is None or process == former:
            time.sleep(0.02)
        process.kill()

    with ThreadPoolExecutor(1) as pool:
        harming = pool.submit(harm)
        with pytest.raises(
            StageError, match=r"controller failed 1 times without .* killed, as the kernel .* lower model.select.chunk"
        ):
            _train(_config(tmp_path), slides, tracker)
        harming.result()


def _running(name: str) -> psutil.Process | None:
    """The newest process of an actor of Ray's, where there is one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if name in "".join(process.cmdline()):
                found.append((process.create_time(), process.pid))
    return psutil.Process(max(found)[1]) if found else None


def _process(name: str) -> psutil.Process:
    found = _running(name)
    assert found is not None
    return found


class _Busy:
    def ready(self) -> None:
        pass
