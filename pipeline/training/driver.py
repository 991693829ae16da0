"""The driver of training: resources, Ray Train's run, its failure policy, and the checkpoint that comes out."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ray.exceptions import ActorDiedError, RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import InsufficientClusterResourcesError

from pipeline.bags.sources import LabelledSource, contents, slides_of
from pipeline.cluster import Bundle, ended, of_training, require
from pipeline.config.recipe import ClusterConfig, Config
from pipeline.errors import PipelineError, ResourceError, StageError, TrackingError
from pipeline.logs import RUN_VARIABLE, VARIABLE, chosen_format, context
from pipeline.model.checkpoint import Progress, check_plan
from pipeline.model.folder import SEEN, Seen
from pipeline.progress import progress
from pipeline.storage.files import join, write_json
from pipeline.storage.lease import Lease
from pipeline.storage.scratch import scratch_folder
from pipeline.tracking.tracker import Tracker
from pipeline.training.headroom import host_advice
from pipeline.training.journal import Journal, send_unsent
from pipeline.training.plan import plan_digest, steps_per_epoch
from pipeline.training.restarts import Failures, Room, Tally, controller_died
from pipeline.training.saver import newest, progress_of
from pipeline.training.session import Job
from pipeline.training.worker import train_worker

log = logging.getLogger(__name__)

_POLL_S = 2.0
_WAIT_S = 24 * 3600  # of a rank for another, as at the end of a look at large validation slides; Ray sees deaths
_PATIENCE = "24"  # attempts of a request, with pauses of up to 15 s: 4 minutes


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    checkpoint: str
    """URI of the folder with weights.safetensors, config.json and state.pt."""
    metrics: dict[str, float]
    """Of the epoch that ended with it."""


def train(
    config: Config,
    slides: Sequence[LabelledSource],
    validation: Sequence[LabelledSource],
    fingerprint: str,
    tracker: Tracker,
    run_id: str,
    lease: Lease | None = None,
) -> Trained:
    """Train on an initialised Ray; the run's name holds the fingerprint, so the same recipe resumes itself.

    Checkpoints are written while the lease stands.

    Raises ResourceError when the cluster can never give the workers, StageError when training fails.
    """
    cluster = config.cluster
    require(of_training(config, cluster.fewest_workers), cluster.start_timeout_s, "train")
    folder = join(config.storage.root, "train", f"{config.name}-{fingerprint}")
    keys, sizes = [s.key for _, s in slides], [s.n_patches for _, s in slides]
    digest = plan_digest(keys, sizes, fingerprint)
    if config.train.keeps_best and not validation:
        raise StageError(
            "train: train.patience and train.keep_best need validation slides, and no slide of the val split is "
            "committed; see the tile stage's ledger, give the split slides, or turn both off"
        )
    _warn_of_threads(config)
    _note_seen(config, folder, [*slides, *validation])
    done = _earlier(folder, digest, tracker, run_id)
    if done is None or not done.is_last:
        job = Job(config, slides, validation, digest, folder, tracker, run_id, lease)
        done = _fit(job, done.step if done else 0)
    elif done.run_id is not None:  # its driver died after the last checkpoint, perhaps before its metrics were sent
        send_unsent(tracker, run_id, Journal(tracker, done.run_id, done.unsent).unsent)
    kept = done.best or done.name
    return Trained(join(folder, kept), done.metrics if kept == done.name else progress_of(folder, kept).metrics)


def _note_seen(config: Config, folder: str, slides: Sequence[LabelledSource]) -> None:
    """Beside the checkpoints: by what a test on the same slides or patients is known.

    Nothing where the weights come from another training: what that has seen is not known here, and these slides alone
    would be told as all.
    """
    if config.train.begins_with is not None:
        return
    keys = contents(config, (one for _, source in slides for one in slides_of(source)))
    patients = {Seen.patient(slide.patient_id) for slide, _ in slides}
    write_json(join(folder, SEEN), Seen(frozenset(keys), frozenset(patients)).as_json())


def _warn_of_threads(config: Config) -> None:
    threads, cpus = config.train.threads, max(1, int(config.cluster.cpus_per_worker))
    if threads != cpus and not config.cluster.gpus_per_worker:
        log.warning(
            "train.threads=%d compute on the %d CPUs that cluster.cpus_per_worker gives a worker: set train.threads=%d "
            "for speed. That is another recipe, whose sums round otherwise",
            threads,
            cpus,
            cpus,
        )


def _earlier(folder: str, digest: str, tracker: Tracker, run_id: str) -> Progress | None:
    """How far an earlier run of this recipe came, noted in MLflow."""
    found = newest(folder, read=True)
    if found is not None:
        check_plan(join(folder, found.name), found, digest)
        log.info("train: goes on after step %d, epoch %d (%s)", found.step, found.epoch, join(folder, found.name))
        tracker.set_tags(run_id, {"resumed_from_run": str(found.run_id), "resumed_after_step": str(found.step)})
    return found


def _fit(job: Job, step: int) -> Progress:
    """Run the workers, from `step` on, with Ray's restarts of them and ours of its controller."""
    config = job.config
    tally = Tally(job.tracker, job.run_id, job.folder, step, config.cluster.max_failures)
    advice = host_advice(config.train, config.model.select)
    with (
        _watched(job, step) as tell,
        scratch_folder() as scratch,
    ):
        while True:
            try:
                result: Progress = _trainer(job, Failures(tally, advice), str(scratch)).fit().return_value
            except TrainingFailedError as error:
                raise _cause(error) from error
            except ActorDiedError as error:
                tell(controller_died(error, tally, advice))
            except RayError as error:  # the driver lost its cluster
                raise StageError(f"train: {ended(error) or str(error).strip().splitlines()[0]}; run again") from error
            else:
                return result


class _Trainer(TorchTrainer):
    """Leaves SIGINT to the program, like SIGTERM.

    Ray's own handler asks its controller to end the run and waits for it: for as long as the workers find no room.
    """

    def _register_sigint_handler(self, controller: object) -> None:
        pass


def _trainer(job: Job, failures: Failures, scratch: str) -> TorchTrainer:
    """Ray Train's part: the workers and their restarts. It keeps no checkpoint, so its folder is a scratch one."""
    cluster = job.config.cluster
    worker = Bundle(cluster.cpus_per_worker, cluster.gpus_per_worker)
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return _Trainer(
        train_worker,
        train_loop_config={"job": job},  # put into Ray's object store once
        torch_config=_process_group(cluster),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,  # a range is elastic: as many as there is room for
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="run",
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),  # see `restarts`
            worker_runtime_env={"env_vars": _worker_environment(job.config.train.threads)},
            callbacks=[
                failures,
                Room(cluster.wait_minutes, f"{cluster.fewest_workers} x ({worker})"),
            ],
        ),
    )


def _process_group(cluster: ClusterConfig) -> TorchConfig:
    """What the ranks sum through. A rank waits for as long as another one works; Ray's 30 minutes would end a run."""
    return TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=_WAIT_S)


def _worker_environment(threads: int) -> dict[str, str]:
    """Threads of OpenMP; and patience with a storage that is away, for a worker loses work when it gives up."""
    return {
        VARIABLE: chosen_format(),
        RUN_VARIABLE: str(context().get("run", "")),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),  # see `cluster.prepare_environment`
        "AWS_MAX_ATTEMPTS": os.environ.get("AWS_MAX_ATTEMPTS", _PATIENCE),
    }


def _cause(error: TrainingFailedError) -> PipelineError:
    """The error of ours that ended the run (`restarts`), else a StageError with Ray's reason."""
    failure = error.controller_failure if isinstance(error, ControllerError) else error
    match failure:
        case PipelineError():
            return failure
        case InsufficientClusterResourcesError():  # of clusters that say how far they grow
            return ResourceError(f"train: {failure}")
    return StageError(f"train: {error}")


@contextmanager
def _watched(job: Job, step: int) -> Iterator[Callable[[str], None]]:
    """Show steps and epochs, as rank 0 records them in MLflow, and restarts; workers may be elsewhere.

    Yields what tells of a restart, once, whoever knows of it first.
    """
    stop, lock = threading.Event(), threading.Lock()
    told: set[str] = set()

    def tell(restart: str) -> None:
        with lock:
            if restart not in told:
                log.warning("train: %s", restart)
            told.add(restart)

    settings = job.config.train
    steps = settings.epochs * steps_per_epoch(len(job.train), settings.batch_size)

    def watch() -> None:
        shown, away = 0.0, False
        while not stop.wait(_POLL_S):
            try:
                latest, tags = job.tracker.latest(job.run_id)
            except TrackingError as error:
                if not away:
                    log.warning("train: goes on without MLflow for now (%s)", str(error).splitlines()[0])
                away = True
                continue
            away = False
            if "restart" in tags:
                tell(tags["restart"])
            if latest.get("epoch", 0.0) > shown:
                shown = latest["epoch"]
                log.info("train: epoch %d/%d, loss %.4f", shown, settings.epochs, latest["train_loss"])
            if "steps" in latest:
                done.to(int(latest["steps"]))

    thread = threading.Thread(target=watch, name="train-progress", daemon=True)
    with progress("train", steps, "steps", start=step) as done:
        thread.start()
        try:
            yield tell
        finally:
            stop.set()
            thread.join()
