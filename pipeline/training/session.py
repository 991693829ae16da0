"""One rank's training from the newest checkpoint to the last epoch. It knows neither Ray nor where its peers run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from operator import itemgetter
from typing import TYPE_CHECKING

import torch

from ips.bag import Bag
from ips.network.model import IPSModel
from ips.selection.scorer import Scorer
from pipeline import telemetry
from pipeline.bags.augment import Augment
from pipeline.bags.sources import LabelledSource, open_bag
from pipeline.bags.streamed import StreamedSlide
from pipeline.cohort.labels import class_weights, target
from pipeline.columnar import mapped
from pipeline.config.recipe import ClusterConfig, Config
from pipeline.errors import StageError
from pipeline.inference.prediction import BagPrediction, bag_scorer, predict_bag
from pipeline.model.build import build_model, build_optimizer
from pipeline.model.checkpoint import Progress, take_snapshot
from pipeline.storage.lease import Lease
from pipeline.tracking.tracker import Tracker
from pipeline.training.hands import Slides
from pipeline.training.headroom import memory_advice, peak_resident_bytes
from pipeline.training.journal import Journal, epoch_metrics, send_unsent
from pipeline.training.loop import DIVERGED, StepDone, moment, train_steps
from pipeline.training.ranks import Ranks, agreed, gathered
from pipeline.training.saver import Saver, restore
from pipeline.training.stopping import Watch
from pipeline.training.validation import check_finite, look, predict_together
from pipeline.training.winners import Winners

if TYPE_CHECKING:
    from pipeline.bags.streaming import Feed

log = logging.getLogger(__name__)

_SHOWN = 4  # slides on the contact sheet of an epoch
_GROWTH = 1.1  # of memory beyond what was tried, from which on the log says so


@dataclass(frozen=True)
class Job:
    """All that a rank needs to know; travels by pickle, its slides as the columns of tables where they are many."""

    config: Config
    train: Sequence[LabelledSource]
    val: Sequence[LabelledSource]
    plan_digest: str
    folder: str
    """Of the run's checkpoints, a URI."""
    tracker: Tracker
    run_id: str
    lease: Lease | None = None
    """Under which checkpoints are written; None where nobody else can write there."""


def run_session(
    job: Job,
    ranks: Ranks,
    device: torch.device,
    start: str | None,
    is_leaving: Callable[[], bool] = lambda: False,
) -> Progress:
    """Train to the last epoch; all ranks call this with the same arguments but their rank and device.

    All validate, each its part. Rank 0 alone writes checkpoints and logs, which depends on nothing of its rank.

    Args:
        job: what to train.
        ranks: where this rank stands.
        device: of this rank.
        start: name of the checkpoint to go on from; None begins.
        is_leaving: asked after every step on every rank: whether the machine is about to be taken away. A checkpoint
            is then written at once.
    """
    settings = job.config.train
    model, optimizer, winners, progress = _begun(job, device, start)
    if progress.is_last:  # the worker was lost after its last step, or early stopping had ended the run
        if ranks.rank == 0:
            send_unsent(job.tracker, job.run_id, progress.unsent)
        return progress
    bound = 0.0  # peak memory after the trial of the largest bags and one step: what later steps should not pass
    with ExitStack() as stack:
        keeper = _Keeper.at_work(job, model, optimizer, winners, progress, stack) if ranks.rank == 0 else None
        for done in train_steps(
            model,
            optimizer,
            training_slides(job),
            settings,
            job.config.model.select,
            seed=job.config.seed,
            start_epoch=progress.epoch,
            start_step=progress.step_in_epoch,
            ranks=ranks,
            winners=winners,
        ):
            progress = _advanced(progress, done, settings.epochs)
            leaving = is_leaving()
            bound = bound or _peak_bytes(ranks, device)
            if keeper is not None:
                keeper.note(done)
            looked = _look(model, job, ranks, device, done)
            if done.last_of_epoch:
                peaks = {"peak_memory_mb": _peak_bytes(ranks, device) / 1e6, "memory_bound_mb": bound / 1e6}
                progress = replace(progress, metrics={**progress.metrics, **peaks})
            if keeper is not None:
                progress = keeper.after(done, progress, looked, leaving=leaving)
            if done.last_of_epoch and settings.patience is not None:
                progress = replace(progress, is_last=agreed(ranks, device, answer=progress.is_last))
            if progress.is_last:
                break
    return progress


def _begun(
    job: Job, device: torch.device, start: str | None
) -> tuple[IPSModel, torch.optim.Optimizer, Winners | None, Progress]:
    """Fresh, or as a checkpoint has them; no winners where every visit scores its slide."""
    settings, sizes = job.config.train, [source.n_patches for _, source in job.train]
    torch.manual_seed(job.config.seed)  # the same initial weights on every rank
    model = build_model(job.config, pretrained=start is None).to(device)
    optimizer = build_optimizer(model, settings)
    serve = settings.reselect_every > 1
    winners = Winners(sizes, job.config.model.select.memory, settings.reselect_every) if serve else None
    if start is None:
        return model, optimizer, winners, Progress(0, 0, job.plan_digest)
    load = None if winners is None else winners.load
    return model, optimizer, winners, restore(job.folder, start, model, optimizer, job.plan_digest, load)


def _advanced(before: Progress, done: StepDone, epochs: int) -> Progress:
    """The progress after one more step; at the end of an epoch with its metrics."""
    sums = {"steps": 1.0, "loss": done.loss, "patches": float(done.patches), "seconds": done.seconds}
    sums |= {"waited": done.waited, "read": float(done.read)}
    if done.changed:
        sums |= {"rescored": float(len(done.changed)), "changed": sum(done.changed)}
    tally = {key: before.tally.get(key, 0.0) + value for key, value in sums.items()}
    if not done.last_of_epoch:
        return replace(before, step=done.step, step_in_epoch=before.step_in_epoch + 1, tally=tally)
    epoch = done.epoch + 1
    metrics = epoch_metrics(epoch, tally)
    return replace(
        before, epoch=epoch, step=done.step, step_in_epoch=0, tally={}, metrics=metrics, is_last=epoch == epochs
    )


@dataclass
class _Keeper:
    """What rank 0 does beside training: checkpoints, metrics."""

    job: Job
    model: IPSModel
    optimizer: torch.optim.Optimizer
    winners: Winners | None
    journal: Journal
    saver: Saver
    watch: Watch
    saved_at: float = field(default_factory=time.monotonic)
    has_left: bool = False
    has_warned: bool = False

    @classmethod
    def at_work(
        cls,
        job: Job,
        model: IPSModel,
        optimizer: torch.optim.Optimizer,
        winners: Winners | None,
        progress: Progress,
        stack: ExitStack,
    ) -> _Keeper:
        """From `progress` on, until the stack ends.

        The journal ends last: a finished training is kept even where its last metrics cannot be sent.
        """
        journal = stack.enter_context(Journal(job.tracker, job.run_id, progress.unsent))
        saver = stack.enter_context(Saver(job.folder, job.lease.check if job.lease else lambda: None))
        return cls(job, model, optimizer, winners, journal, saver, Watch.of(progress.metrics))

    def note(self, done: StepDone) -> None:
        """Log the step."""
        changed = {"winners_changed": sum(done.changed) / len(done.changed)} if done.changed else {}
        self.journal.add(done.step, {"loss": done.loss, "lr": done.lr, "steps": float(done.step), **changed})
        telemetry.count("ips_patches_total", done.read, stage="train")
        telemetry.count("ips_step_seconds_total", done.seconds)
        telemetry.count("ips_wait_seconds_total", done.waited)
        telemetry.level("ips_checkpoint_age_seconds", time.monotonic() - self.saved_at)

    def after(
        self, done: StepDone, progress: Progress, looked: Mapping[str, float] | None, *, leaving: bool
    ) -> Progress:
        """At the end of an epoch log it, and what was looked at; write a checkpoint where one is due."""
        if done.last_of_epoch:
            progress = self._end_epoch(progress, looked)
            shown = list(done.chosen.items())[:_SHOWN]
            self.journal.show(progress.epoch, [(self.job.train[index][1], rows) for index, rows in shown])
        must = progress.is_last or progress.best == progress.name
        due = done.last_of_epoch or self._is_due(done.step, self.job.config.cluster)
        if leaving and not self.has_left:
            self.has_left = True
            self._save(progress)
            self.saver.wait()
        elif must or (due and not self.saver.is_busy):
            self._save(progress)
        return progress

    def _end_epoch(self, progress: Progress, looked: Mapping[str, float] | None) -> Progress:
        """With what a look at the validation split says, where one was due."""
        settings, epoch = self.job.config.train, progress.epoch
        metrics, watch = {**progress.metrics, **_work()}, self.watch
        self._warn_of_memory(metrics)
        if looked is not None:
            metrics |= looked
            if settings.keeps_best:
                watch = self.watch = watch.after(metrics, epoch, settings)
        metrics |= watch.metrics
        self.journal.add(progress.step, metrics)
        telemetry.level("ips_epoch", epoch)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key != "epoch")
        log.info("epoch %d/%d: %s", epoch, settings.epochs, shown)
        return replace(
            progress,
            metrics=metrics,
            best=progress.name if watch.best_epoch == epoch else progress.best,
            is_last=progress.is_last or watch.is_over(settings),
        )

    def _warn_of_memory(self, metrics: Mapping[str, float]) -> None:
        peak, bound = metrics["peak_memory_mb"], metrics["memory_bound_mb"]
        if peak > _GROWTH * bound and not self.has_warned:
            self.has_warned = True
            log.warning(
                "train: a worker has used %.0f MB, and %.0f MB when the largest slides had been tried and one step "
                "taken: later steps or looks need more than was tried, and may run out of it",
                peak,
                bound,
            )

    def _is_due(self, step: int, cluster: ClusterConfig) -> bool:
        if cluster.checkpoint_steps is not None and step % cluster.checkpoint_steps == 0:
            return True
        return time.monotonic() - self.saved_at >= 60 * cluster.checkpoint_minutes

    def _save(self, progress: Progress) -> None:
        complete = replace(progress, run_id=self.job.run_id, unsent=self.journal.unsent)
        winners = None if self.winners is None else self.winners.state
        self.saver.save(take_snapshot(self.model, self.optimizer, self.job.config, complete, winners))
        self.saved_at = time.monotonic()


def training_slides(job: Job) -> Slides:
    """The loop's view of the training slides."""
    tasks, settings = job.config.tasks, job.config.train
    read = [(slide.slide_id, slide.labels, source.n_patches) for slide, source in job.train]  # made one after another
    weights = {task.name: class_weights(task, [labels[task.name] for _, labels, _ in read]) for task in tasks}
    threads, feed = _threads(job), _feed(job)

    def bag(index: int, epoch: int) -> Bag:
        source = job.train[index][1]
        augment = Augment(job.config.seed, epoch, source.key, settings.stain_jitter) if settings.augment else None
        if feed is not None:
            return feed.bag(index, threads=threads, augment=augment)
        return open_bag(source, threads=threads, augment=augment)

    slides = Slides(
        sizes=[n_patches for _, _, n_patches in read],
        targets=[{task.name: target(task, labels[task.name]) for task in tasks} for _, labels, _ in read],
        kinds={task.name: task.kind for task in tasks},
        names=[slide_id for slide_id, _, _ in read],
        class_weights={name: torch.tensor(weight) for name, weight in weights.items() if weight is not None},
        bag=bag,
    )
    return slides if feed is None else replace(slides, announce=feed.announce)


def _threads(job: Job) -> int:
    """That decode on this rank."""
    return max(1, math.floor(job.config.cluster.cpus_per_worker))


def _feed(job: Job) -> Feed | None:
    """What streams the slides; None where they come from a store."""
    if not job.train or not isinstance(job.train[0][1], StreamedSlide):  # all of them are of one kind
        return None
    from pipeline.bags.streaming import Feed  # Ray Data loads for seconds

    slides: Sequence[StreamedSlide] = mapped(itemgetter(1), job.train)
    return Feed(slides, cpus=job.config.tiling.cpus, readers=job.config.cluster.readers_per_worker)


def _looks(epoch: int, epochs: int, every: int) -> bool:
    """Whether the end of so many epochs is one at which the validation split is looked at."""
    return epoch == epochs or epoch % every == 0


def _look(model: IPSModel, job: Job, ranks: Ranks, device: torch.device, done: StepDone) -> dict[str, float] | None:
    """What the validation slides say of the model after a step, where a look is due; all ranks call this together.

    Raises:
        StageError: the step broke the weights, which then are not saved; or memory runs out.
    """
    settings = job.config.train
    if not job.val or not done.last_of_epoch or not _looks(done.epoch + 1, settings.epochs, settings.validate_every):
        return None
    when = f"after {moment(done.epoch, done.step, done.lr)}; {DIVERGED}"
    names = [slide.slide_id for slide, _ in job.val]

    @cache
    def scorer() -> Scorer | None:
        return bag_scorer(model, job.config)  # where a slide needs it: what fails then is told to the other ranks

    def predict(index: int) -> BagPrediction:
        bag = open_bag(job.val[index][1], threads=_threads(job), augment=None)
        try:
            with memory_advice(settings, job.config.model.select, "validation"):
                return predict_bag(model, bag, job.config, scorer())
        except ValueError as error:  # `ips` refuses logits that are not finite
            raise StageError(f"{error}, of the validation slide {names[index]} {when}") from error

    found = predict_together(predict, [source.n_patches for _, source in job.val], ranks, device)
    looked = look(job.config.tasks, [slide.labels for slide, _ in job.val], found)
    check_finite(found, looked, names, when)
    return looked


def _work() -> dict[str, float]:
    """Seconds of all threads of this rank since the last epoch, by kind of work: they overlap with the steps'."""
    sums = telemetry.drain()
    telemetry.offer(sums, "train")
    return {f"{kind}_s": value for kind, value in telemetry.seconds(sums).items()}


def _peak_bytes(ranks: Ranks, device: torch.device) -> float:
    """The largest rank's, of device memory since the process began, or of the resident set where it computes on a CPU.

    All ranks call this together.
    """
    mine = float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_resident_bytes()
    return max(float(peak) for peak in gathered(repr(mine).encode(), ranks, device))
