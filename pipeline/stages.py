"""The four stages of a run: what identifies each one, and what it does.

A stage's fingerprint is the digest of its identity: the config fields that determine its result and the digests
of its inputs. Its record, `<root>/stages/<stage>-<fingerprint>.json`, is written last; a record whose outputs
still exist means the stage is done.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import csv

from pipeline import cluster
from pipeline.checkpoint import CONFIG, WEIGHTS
from pipeline.cohort import Cohort, CohortSlide
from pipeline.config import Config
from pipeline.config_base import fingerprint
from pipeline.errors import DataBudgetError, StageError, StorageError
from pipeline.patches import PatchStore, SlideStatus, StoredSlide
from pipeline.storage import SourceVersion, download, join, source_version, write_bytes
from pipeline.tracking import Tracker

if TYPE_CHECKING:
    from pipeline.evaluate import Evaluation

log = logging.getLogger(__name__)

_DEFAULT_BAD_SHARE = 0.05  # of the cohort's slides, at least one, when tiling.max_bad_slides is null


@dataclass(frozen=True)
class Record:
    """What a finished stage leaves behind; the JSON of `<stage>-<fingerprint>.json`."""

    stage: str
    fingerprint: str
    outputs: Mapping[str, str]
    """Name -> URI; every one must still exist for the record to count."""
    metrics: Mapping[str, float]
    facts: Mapping[str, Any]
    """What later stages and people need to know: counts, versions, names."""
    run_id: str | None = None
    seconds: float = 0.0


LabelledSlide = tuple[CohortSlide, StoredSlide]


@dataclass
class Workspace:
    """What the stages share during one invocation."""

    config: Config
    cohort: Cohort
    tracker: Callable[[], Tracker]
    ray: Callable[[], None]
    """Joins or starts Ray, once, when a stage first needs it."""
    lineage: Mapping[str, str]
    """Name -> value of what this invocation's results come from."""
    records: dict[str, Record] = field(default_factory=dict)

    def stored(self, split: str | None = None) -> list[LabelledSlide]:
        """The committed slides of a split, in the cohort's order."""
        store = patch_store(self.config)
        keys: Mapping[str, str] = self.records["tile"].facts["keys"]
        chosen = [
            slide for slide in self.cohort.slides if slide.slide_id in keys and (split is None or slide.split == split)
        ]
        with ThreadPoolExecutor(16) as pool:
            return list(zip(chosen, pool.map(lambda s: store.slide(keys[s.slide_id]), chosen), strict=True))


@dataclass(frozen=True)
class Stage:
    """One stage: `identity` needs the records of the stages before it."""

    name: str
    identity: Callable[[Workspace], Mapping[str, Any]]
    work: Callable[[Workspace, str, str], Record]
    """(workspace, fingerprint, MLflow run id) -> record."""


def patch_store(config: Config) -> PatchStore:
    """The store of the config's tiling spec."""
    assert config.storage.patches is not None  # compose.py fills it
    return PatchStore(config.storage.patches, config.tiling.fingerprint())


def _tile_identity(space: Workspace) -> Mapping[str, Any]:
    slides = space.cohort.slides
    with ThreadPoolExecutor(16) as pool:
        versions = list(pool.map(_version, (slide.uri for slide in slides)))
    rows = [[s.slide_id, s.uri, s.mpp, asdict(v) if v else None] for s, v in zip(slides, versions, strict=True)]
    return {"store": patch_store(space.config).uri, "slides": rows}


def _version(uri: str) -> SourceVersion | None:
    """The source's version; None where it cannot be read, which the tile stage then reports by slide."""
    try:
        return source_version(uri)
    except StorageError as error:
        log.warning("%s", error)
        return None


def _tile(space: Workspace, stage_fingerprint: str, run_id: str) -> Record:
    from pipeline.ingest import TRANSIENT, tile_cohort  # Ray Data loads in seconds; only when there is work

    config, slides = space.config, space.cohort.slides
    space.ray()
    cluster.require([cluster.Bundle(config.tiling.cpus)], config.cluster.start_timeout_s, "tile")
    done = 0

    def on_status(status: SlideStatus) -> None:
        nonlocal done
        done += 1
        if status.status == "quarantined":
            log.warning("tile: %s is quarantined: %s", status.slide_id, status.reason)
        if done % max(1, len(slides) // 10) == 0:
            log.info("tile: %d/%d slides", done, len(slides))

    assert config.storage.patches is not None
    statuses = tile_cohort(slides, config.tiling, config.storage.patches, cpus=config.tiling.cpus, on_status=on_status)
    ledger = join(config.storage.root, "stages", f"tile-{stage_fingerprint}-slides.csv")
    write_bytes(ledger, ledger_csv(statuses))
    tracker = space.tracker()
    tracker.log_text(run_id, ledger_csv(statuses).decode(), "slides.csv")
    metrics = {
        "slides": float(len(statuses)),
        "slides_quarantined": float(sum(s.status == "quarantined" for s in statuses)),
        "patches": float(sum(s.n_patches for s in statuses)),
        "bad_tiles": float(sum(s.n_bad_tiles for s in statuses)),
    }
    tracker.log_metrics(run_id, metrics, 0)
    _check_budget(config, statuses)
    keys = {s.slide_id: s.key for s in statuses if s.status == "committed"}
    outputs = {"store": patch_store(config).uri, "ledger": ledger}
    # A missing file changes the stage's identity when it appears; the other transient reasons do not show there.
    passing = TRANSIENT - {"missing", "directory"}
    again = [s.slide_id for s in statuses if (s.reason or "").partition(":")[0] in passing]
    return Record("tile", stage_fingerprint, outputs, metrics, {"keys": keys, "try_again": again})


def ledger_csv(statuses: Sequence[SlideStatus]) -> bytes:
    """One row a slide: status, reason, counts."""
    columns = ("slide_id", "uri", "status", "reason", "n_patches", "n_bad_tiles", "key")
    table = pa.table({name: pa.array([getattr(s, name) for s in statuses]) for name in columns})
    sink = io.BytesIO()
    csv.write_csv(table, sink)
    return sink.getvalue()


def _check_budget(config: Config, statuses: Sequence[SlideStatus]) -> None:
    bad = [s for s in statuses if s.status == "quarantined"]
    allowed = config.tiling.max_bad_slides
    if allowed is None:
        allowed = max(1, int(_DEFAULT_BAD_SHARE * len(statuses)))
    if len(bad) > allowed:
        lines = "\n".join(f"  - {s.slide_id} ({s.uri}): {s.reason}" for s in bad)
        raise DataBudgetError(
            f"{len(bad)} of {len(statuses)} slides are quarantined and {allowed} are allowed:\n{lines}\n"
            f"The other {len(statuses) - len(bad)} are committed and kept. Mend or remove the bad ones, "
            f"or set tiling.max_bad_slides={len(bad)}"
        )


def _labelled(slides: Sequence[LabelledSlide]) -> list[Any]:
    return [[slide.slide_id, slide.patient_id, stored.key, dict(slide.labels)] for slide, stored in slides]


def _train_identity(space: Workspace) -> Mapping[str, Any]:
    return {
        "recipe": space.config.recipe(),
        "tiling": space.config.tiling.fingerprint(),
        "weights": _weights_version(space.config),
        "train": _labelled(space.stored("train")),
        "val": _labelled(space.stored("val")),
    }


def _weights_version(config: Config) -> Mapping[str, Any] | None:
    """Which version of the pretrained weights: another file under the same name is another recipe."""
    uri = config.model.encoder.weights
    return None if uri is None else asdict(source_version(uri))


def _train(space: Workspace, stage_fingerprint: str, run_id: str) -> Record:
    from pipeline.train import train

    slides, validation = space.stored("train"), space.stored("val")
    _warn_small_bags(space.config, [stored.n_patches for _, stored in slides])
    tracker, cohort = space.tracker(), space.cohort
    tracker.log_dataset(run_id, "cohort", cohort.digest, cohort.uri, "training")
    space.ray()
    trained = train(space.config, slides, validation, stage_fingerprint, tracker, run_id)
    facts = {"train_slides": len(slides), "val_slides": len(validation)}
    return Record("train", stage_fingerprint, {"checkpoint": trained.checkpoint}, trained.metrics, facts)


def _warn_small_bags(config: Config, sizes: Sequence[int]) -> None:
    if not sizes:
        raise StageError("train: no slide of the train split is committed; see the tile stage's ledger")
    if config.model.select.memory >= max(sizes):
        log.warning(
            "model.select.memory=%d is not below the largest bag (%d patches): all patches are used, nothing is "
            "selected; lower it to select",
            config.model.select.memory,
            max(sizes),
        )


def _evaluate_identity(space: Workspace) -> Mapping[str, Any]:
    config = space.config
    return {
        "train": space.records["train"].fingerprint,
        "evaluate": config.evaluate.model_dump(),
        "slides": _labelled(space.stored(config.evaluate.split)),
    }


def _evaluate(space: Workspace, stage_fingerprint: str, run_id: str) -> Record:
    from pipeline.report import render_report

    config, tracker = space.config, space.tracker()
    slides = space.stored(config.evaluate.split)
    tracker.log_dataset(run_id, "cohort", space.cohort.digest, space.cohort.uri, "evaluation")
    space.ray()
    evaluation = cluster.call(
        evaluate_checkpoint,
        (config, space.records["train"].outputs["checkpoint"], slides),
        cpus=config.cluster.cpus_per_worker,
        gpus=config.cluster.gpus_per_worker,
        timeout_s=config.cluster.start_timeout_s,
    )
    folder = join(config.storage.root, "reports", f"{config.name}-{stage_fingerprint}")
    page = render_report(evaluation, config, space.cohort, space.lineage)
    table = io.BytesIO()
    csv.write_csv(evaluation.predictions, table)
    write_bytes(join(folder, "predictions.csv"), table.getvalue())
    write_bytes(join(folder, "report.html"), page.encode())
    tracker.log_metrics(run_id, evaluation.metrics, 0)
    tracker.log_text(run_id, page, "report.html")
    tracker.log_text(run_id, table.getvalue().decode(), "predictions.csv")
    outputs = {"report": join(folder, "report.html"), "predictions": join(folder, "predictions.csv")}
    return Record("evaluate", stage_fingerprint, outputs, evaluation.metrics, {"slides": len(slides)})


def evaluate_checkpoint(config: Config, checkpoint: str, slides: Sequence[LabelledSlide]) -> Evaluation:
    """Evaluate a checkpoint folder, given by URI; runs as a Ray task, on a GPU where the config asks for one."""
    from pipeline.evaluate import evaluate
    from pipeline.inference import load_model

    with _model_folder(checkpoint) as folder:
        model, _ = load_model(folder)
    return evaluate(model, config, slides)


@contextmanager
def _model_folder(checkpoint: str) -> Iterator[Path]:
    """Weights and config of a checkpoint as local files."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in (WEIGHTS, CONFIG):
            download(join(checkpoint, name), Path(scratch) / name)
        yield Path(scratch)


def _register_identity(space: Workspace) -> Mapping[str, Any]:
    tracking = space.config.tracking
    return {"evaluate": space.records["evaluate"].fingerprint, "model": tracking.model, "registry": tracking.uri}


def _register(space: Workspace, stage_fingerprint: str, run_id: str) -> Record:
    from pipeline.registry import promote, register_model

    tracker, name = space.tracker(), space.config.tracking.model
    assert name is not None  # compose.py fills it
    train, evaluated = space.records["train"], space.records["evaluate"]
    tags = {
        **space.lineage,
        "slide_keys_digest": fingerprint(sorted(space.records["tile"].facts["keys"].values())),
        "train_fingerprint": train.fingerprint,
        "evaluate_fingerprint": evaluated.fingerprint,
        "train_run_id": str(train.run_id),
    }
    with _model_folder(train.outputs["checkpoint"]) as folder:
        registered = register_model(
            tracker,
            name,
            folder,
            run_id,
            tags=tags,
            metrics=evaluated.metrics,
            example_uri=space.cohort.slides[0].uri,
        )
    former = promote(tracker, name, registered.version)
    facts = {"model": name, "version": registered.version, "alias": "champion", "previous": former}
    return Record("register", stage_fingerprint, {}, {}, facts)


STAGES: tuple[Stage, ...] = (
    Stage("tile", _tile_identity, _tile),
    Stage("train", _train_identity, _train),
    Stage("evaluate", _evaluate_identity, _evaluate),
    Stage("register", _register_identity, _register),
)
"""In the order of the data's way."""
