"""What one Ray Train worker does: wires the loop to its bags, its checkpoints, the other ranks and MLflow."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import get_device

from ips.model import IPSModel
from pipeline.bags import Augment, PatchBag
from pipeline.build import build_model, build_optimizer
from pipeline.checkpoint import Progress, load_checkpoint, save_checkpoint
from pipeline.cohort import CohortSlide
from pipeline.config import Config
from pipeline.inference import predict_bag
from pipeline.labels import class_weights, target, truth
from pipeline.loop import Slides, StepDone, train_steps
from pipeline.metrics import MEASURES, measure
from pipeline.patches import StoredSlide
from pipeline.ranks import joined_ranks
from pipeline.tracking import Tracker

log = logging.getLogger(__name__)

LabelledSlide = tuple[CohortSlide, StoredSlide]


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know; travels by pickle."""

    config: Config
    train: tuple[LabelledSlide, ...]
    val: tuple[LabelledSlide, ...]
    plan_digest: str
    tracker: Tracker
    run_id: str


def train_worker(loop_config: Mapping[str, Job]) -> dict[str, float]:
    """Train to the last epoch, from the newest checkpoint if there is one; the last epoch's metrics.

    Every rank reports once an epoch; rank 0 attaches the checkpoint and afterwards logs the epoch to MLflow, so
    a restarted run logs no step twice.
    """
    job = loop_config["job"]
    rank = ray.train.get_context().get_world_rank()
    settings = job.config.train
    torch.manual_seed(job.config.seed)  # the same initial weights on every rank
    model = build_model(job.config, pretrained=ray.train.get_checkpoint() is None).to(get_device())
    optimizer = build_optimizer(model, settings)
    progress = _resume(model, optimizer, job.plan_digest)
    logged = job.tracker.latest_step(job.run_id, "loss") if rank == 0 else -1
    steps: list[StepDone] = []
    for done in train_steps(
        model,
        optimizer,
        _slides(job),
        settings,
        job.config.model.select,
        seed=job.config.seed,
        start_epoch=progress.epoch,
        ranks=joined_ranks(),
    ):
        steps.append(done)
        if not done.last_of_epoch:
            continue
        metrics = _epoch_metrics(steps)
        if rank == 0 and job.val and _validates(done.epoch + 1, settings.epochs, settings.validate_every):
            metrics |= _validate(model, job)
        progress = Progress(done.epoch + 1, done.step, job.plan_digest, metrics)
        _report(model, optimizer, job, progress, is_first=rank == 0)
        if rank == 0:
            _log(job, [step for step in steps if step.step > logged], metrics)
        steps = []
    return progress.metrics


def _resume(model: IPSModel, optimizer: torch.optim.Optimizer, plan_digest: str) -> Progress:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress(0, 0, plan_digest)
    with checkpoint.as_directory() as folder:
        return load_checkpoint(Path(folder), model, optimizer, plan_digest)


def _slides(job: Job) -> Slides:
    """The loop's view of the training slides."""
    tasks = job.config.tasks
    weights = {task.name: class_weights(task, [slide.labels[task.name] for slide, _ in job.train]) for task in tasks}
    threads = max(1, math.floor(job.config.cluster.cpus_per_worker))

    def bag(index: int, epoch: int) -> PatchBag:
        stored = job.train[index][1]
        settings = job.config.train
        augment = Augment(job.config.seed, epoch, stored.key, settings.stain_jitter) if settings.augment else None
        return PatchBag([stored], threads=threads, augment=augment)

    return Slides(
        sizes=[stored.n_patches for _, stored in job.train],
        targets=[{task.name: target(task, slide.labels[task.name]) for task in tasks} for slide, _ in job.train],
        kinds={task.name: task.kind for task in tasks},
        class_weights={name: torch.tensor(weight) for name, weight in weights.items() if weight is not None},
        bag=bag,
    )


def _validates(epoch: int, epochs: int, every: int) -> bool:
    return epoch == epochs or epoch % every == 0


def _validate(model: IPSModel, job: Job) -> dict[str, float]:
    """Measures of each task on the validation slides; absent where their labels cannot give them."""
    predictions = [predict_bag(model, PatchBag([stored], threads=1, augment=None), job.config) for _, stored in job.val]
    result: dict[str, float] = {}
    for task in job.config.tasks:
        truths = np.array([truth(task, slide.labels[task.name]) for slide, _ in job.val])
        values = np.stack([p.values[task.name] for p in predictions])
        found = zip(MEASURES[task.kind], measure(task, values, truths), strict=True)
        result |= {f"val_{name}_{task.name}": value for name, value in found if not math.isnan(value)}
    return result


def _epoch_metrics(steps: Sequence[StepDone]) -> dict[str, float]:
    seconds = sum(step.seconds for step in steps)
    return {
        "epoch": float(steps[-1].epoch + 1),
        "train_loss": sum(step.loss for step in steps) / len(steps),
        "patches_per_s": sum(step.patches for step in steps) / seconds,
        "device_wait": sum(step.waited for step in steps) / seconds,
        "epoch_s": seconds,
    }


def _report(
    model: IPSModel,
    optimizer: torch.optim.Optimizer,
    job: Job,
    progress: Progress,
    *,
    is_first: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if is_first:
            save_checkpoint(Path(folder), model, optimizer, job.config, progress)
        ray.train.report(
            {"epoch": progress.epoch, **progress.metrics},
            checkpoint=Checkpoint.from_directory(folder) if is_first else None,
            checkpoint_dir_name=checkpoint_name(progress.epoch),
        )


def checkpoint_name(epoch: int) -> str:
    """Folder of the checkpoint after so many epochs, below the run's folder."""
    return f"epoch-{epoch:04d}"


def _log(job: Job, steps: Sequence[StepDone], metrics: dict[str, float]) -> None:
    """Log an epoch; one that a restart did again is logged already."""
    if not steps:
        return
    for step in steps:
        job.tracker.log_metrics(job.run_id, {"loss": step.loss, "lr": step.lr}, step.step)
    job.tracker.log_metrics(job.run_id, metrics, steps[-1].step)
    shown = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key != "epoch")
    log.info("epoch %d/%d: %s", steps[-1].epoch + 1, job.config.train.epochs, shown)
