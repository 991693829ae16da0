"""The driver of training: resources, Ray Train's run, its failure policy, and the checkpoint that comes out."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from pipeline.cluster import Bundle, require
from pipeline.config import Config
from pipeline.errors import Interrupted, PipelineError, StageError
from pipeline.plan import plan_digest
from pipeline.storage import arrow_filesystem, join
from pipeline.tracking import Tracker
from pipeline.worker import Job, LabelledSlide, checkpoint_name, train_worker

log = logging.getLogger(__name__)

_KEEP = 2  # checkpoints kept a run: the last one, and the one before while it is written
_POLL_S = 2.0


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    checkpoint: str
    """URI of the folder with weights.safetensors, config.json and state.pt."""
    metrics: dict[str, float]


def train(
    config: Config,
    slides: Sequence[LabelledSlide],
    validation: Sequence[LabelledSlide],
    fingerprint: str,
    tracker: Tracker,
    run_id: str,
) -> Trained:
    """Train on an initialised Ray; the run's name holds the fingerprint, so the same recipe resumes itself.

    Raises ResourceError when the cluster can never give the workers, StageError when training fails.
    """
    cluster = config.cluster
    worker = Bundle(cluster.cpus_per_worker, cluster.gpus_per_worker)
    require([worker] * cluster.fewest_workers, cluster.start_timeout_s, "train")
    name = f"{config.name}-{fingerprint}"
    root = join(config.storage.root, "train")
    keys, sizes = [s.key for _, s in slides], [s.n_patches for _, s in slides]
    job = Job(config, tuple(slides), tuple(validation), plan_digest(keys, sizes, fingerprint), tracker, run_id)
    with _interruptible(), _progress(tracker, run_id, config.train.epochs):
        try:
            result = _trainer(job, name, root).fit()
        except TrainingFailedError as error:
            raise _cause(error) from error
    return Trained(join(root, name, checkpoint_name(config.train.epochs)), result.return_value)


def _trainer(job: Job, name: str, root: str) -> TorchTrainer:
    cluster = job.config.cluster
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(max(60.0, cluster.start_timeout_s)))
    filesystem, path = arrow_filesystem(root)
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,  # a range is elastic: as many as there is room for
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=1),
            checkpoint_config=CheckpointConfig(num_to_keep=_KEEP),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(cluster.cpus_per_worker)))}},
        ),
    )


def _cause(error: TrainingFailedError) -> PipelineError:
    """The worker's own error where it is one of ours, else a StageError with the first line of the reason."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        inner = getattr(failure, "_base_exc", failure)  # Ray's wrapper has no public way to what it wraps
        if isinstance(inner, PipelineError):
            return inner
    return StageError(f"train: {error}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train replaces the SIGINT handler and leaves by SystemExit; turn that into Interrupted and restore."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as leaving:
        raise Interrupted(signal.SIGINT) from leaving
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(tracker: Tracker, run_id: str, epochs: int) -> Iterator[None]:
    """Log each epoch as rank 0 records it in MLflow; workers may be on other machines."""
    stop = threading.Event()

    def watch() -> None:
        shown = 0.0
        while not stop.wait(_POLL_S):
            latest = tracker.latest_metrics(run_id)
            if latest.get("epoch", 0.0) > shown:
                shown = latest["epoch"]
                log.info("train: epoch %d/%d, loss %.4f", shown, epochs, latest["train_loss"])

    thread = threading.Thread(target=watch, name="train-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
