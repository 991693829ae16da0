"""The four stages of a run: what identifies each one, and what it does.

A stage's fingerprint is the digest of its identity: the config fields that determine its result and the digests
of its inputs. Its record, `<root>/stages/<stage>-<fingerprint>.json`, is written last; a record whose outputs
still exist means the stage is done.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import cluster, telemetry
from pipeline.bags.images import source_versions
from pipeline.bags.sources import LabelledSource, image_statuses, patch_root, patch_store
from pipeline.bags.streamed import planned_keys
from pipeline.cohort.splits import check_apart
from pipeline.columnar import Columnar
from pipeline.config.recipe import Config
from pipeline.errors import DataBudgetError, PlanError, StageError
from pipeline.inference.operating import thresholds
from pipeline.ingest.statuses import as_columns, outcomes
from pipeline.ingest.tiler import TRANSIENT, allows_more
from pipeline.ingest.versions import known
from pipeline.model.folder import WEIGHTS
from pipeline.progress import progress
from pipeline.results.tables import table_csv
from pipeline.storage.files import join, read_bytes, source_version, write_bytes
from pipeline.store.ledger import write_ledger
from pipeline.store.patches import PatchStore, SlideStatus
from pipeline.store.rows import asked_digest
from pipeline.training.saver import model_folder
from pipeline.workflow import register
from pipeline.workflow.changes import SHOWN, Labels
from pipeline.workflow.given import index_features
from pipeline.workflow.stage import Record, Stage, Workspace, gone_from, learned, versions

if TYPE_CHECKING:
    from pipeline.results.evaluate import Evaluation

log = logging.getLogger(__name__)

_SAMPLED, _FEW_PICTURES = 2000, 3  # of more slides the page shows few: each costs some 8 requests, and qc shows more
_ASKED = pa.schema([("slide_id", pa.string()), ("asked", pa.string())])
_DEFAULT_BAD_SHARE = 0.05  # of the cohort's slides, at least one, when tiling.max_bad_slides is null


def _tile_identity(space: Workspace) -> Mapping[str, Any]:
    slides, images = space.cohort.slides, space.config.cohort.megapixel_mnist
    if images is not None:
        names = [[slide.slide_id, slide.uri] for slide in slides]
        return {"grid": space.config.tiling.fingerprint(), "files": source_versions(images), "slides": names}
    found = zip(slides, known(space.versions), strict=True)  # which cannot be read the stage reports by slide
    rows = ([slide.slide_id, asked_digest(slide, version)] for slide, version in found)
    return {"store": patch_store(space.config).uri, "slides": Columnar.of(rows, _ASKED, lambda *row: list(row))}


def _tile(space: Workspace, stage_fingerprint: str, run_id: str) -> Record:
    config, slides = space.config, space.cohort.slides
    outputs = {"ledger": join(config.storage.root, "stages", f"tile-{stage_fingerprint}-slides.csv")}
    if config.cohort.megapixel_mnist is not None:  # nothing to cut: patches are drawn when they are asked for
        statuses: Sequence[SlideStatus] = image_statuses(config, slides)
    elif config.given_features:
        statuses = index_features(space)
        outputs["store"] = patch_store(config).uri
    else:
        statuses = _tile_slides(space, outputs["ledger"])
        store = patch_store(config)
        store.tidy()
        outputs["store"] = store.uri
        outputs |= _review(space, store, statuses, stage_fingerprint)
        folder = join(config.storage.root, "ledger", f"tile-{stage_fingerprint}")
        outputs |= write_ledger(store, outcomes(slides, statuses, space.versions), folder)
    listed = ledger_csv(statuses)
    write_bytes(outputs["ledger"], listed)
    tracker = space.tracker()
    tracker.log_text(run_id, listed.decode(), "slides.csv")
    if "quality" in outputs:
        tracker.log_text(run_id, read_bytes(outputs["quality"]).decode(), "quality.html")
    held = as_columns(statuses)
    bad = list(held.filter(pc.equal(held.table["status"], "quarantined")))
    metrics = {
        "slides": float(len(held)),
        "slides_quarantined": float(len(bad)),
        "patches": float(pc.sum(held.table["n_patches"]).as_py() or 0),
        "bad_tiles": float(pc.sum(held.table["n_bad_tiles"]).as_py() or 0),
    }
    tracker.log_metrics(run_id, metrics, 0)
    _check_budget(config, bad, len(held), outputs["ledger"])
    passing = TRANSIENT - {"missing", "directory"}  # a file that appears changes the stage's identity
    again = [s.slide_id for s in bad if (s.reason or "").partition(":")[0] in passing]
    facts: dict[str, Any] = {"try_again": again, "too_expensive": [s.limits for s in bad if s.limits is not None]}
    if "ledger_slides" not in outputs:
        facts["keys"] = {s.slide_id: s.key for s in statuses if s.status == "committed"}
    return Record("tile", stage_fingerprint, outputs, metrics, facts)


def _review(space: Workspace, store: PatchStore, statuses: Sequence[SlideStatus], named: str) -> dict[str, str]:
    """The quality page, `named` by the stage's fingerprint; it stands even where too many slides are bad."""
    from pipeline.results.quality import PICTURES, write_quality
    from pipeline.results.quality_rows import quality_rows

    config, slides = space.config, space.cohort.slides
    folder = join(config.storage.root, "reports", f"{config.name}-tile-{named}")
    pictures = PICTURES if len(statuses) <= _SAMPLED else _FEW_PICTURES
    rows = quality_rows(store, statuses)
    outputs = write_quality(store, rows, folder, config.name, config.tiling.fingerprint(), pictures, slides)
    log.info("tile: look at %s", outputs["quality"])
    return outputs


def _tile_slides(space: Workspace, ledger: str) -> Sequence[SlideStatus]:
    """Tile the cohort on Ray, and say how far it is; `ledger` is where all slides will be listed."""
    from pipeline.ingest.graph import tile_cohort  # Ray Data loads in seconds; only when there is work

    config, slides = space.config, space.cohort.slides
    bad = Counter[str]()

    def on_status(status: SlideStatus) -> None:
        done.advance()
        telemetry.count("ips_slides_total", stage="tile", outcome=status.status)
        telemetry.count("ips_patches_total", status.n_patches, stage="tile")
        telemetry.count("ips_patches_lost_total", status.n_bad_tiles, stage="tile")
        if status.status == "quarantined":
            kind = str(status.reason).partition(":")[0]
            bad[kind] += 1
            if bad[kind] <= SHOWN:
                slide = {"slide": status.slide_id}
                log.warning("tile: %s is quarantined: %s", status.slide_id, status.reason, extra=slide)
            if bad[kind] == SHOWN:
                log.warning("tile: further slides that are quarantined as %s are counted; %s lists all", kind, ledger)

    def start() -> None:
        space.ray()
        cluster.require([cluster.Bundle(config.tiling.cpus)], config.cluster.start_timeout_s, "tile")

    with progress("tile", len(slides), "slides") as done:
        statuses = tile_cohort(
            slides,
            config.tiling,
            patch_root(config),
            cpus=config.tiling.cpus,
            on_status=on_status,
            pixels=config.train.source == "store",
            versions=space.versions,
            start=start,
            here=cluster.is_here(config.cluster),
        )
    if bad:
        log.warning("tile: quarantined: %s", ", ".join(f"{count:,} {kind}" for kind, count in bad.most_common()))
    return statuses


def _tiles_outdated(space: Workspace, record: Record) -> str | None:
    """Slides that are not in the store any more, or may take more now; those alone are tiled again."""
    config = space.config
    if config.cohort.megapixel_mnist is not None:
        return None
    if any(allows_more(config.tiling, limits) for limits in record.facts.get("too_expensive", ())):
        return "slides that were too expensive may take more now"
    gone = gone_from("store", record.tiled, space.store.gone)
    return _plans_outdated(space, space.store, record) if gone is None and config.planned else gone


def _plans_outdated(space: Workspace, plans: PatchStore, record: Record) -> str | None:
    """Slides last planned from another version of their files, as by another job: `open_streamed` refuses them."""
    slides, keys = space.cohort.slides, record.keys
    current = planned_keys(plans, slides, space.versions)
    others = sorted(s.slide_id for s, key in zip(slides, current, strict=True) if keys.get(s.slide_id, key) != key)
    return f"{len(others)} slides were planned from another version: {', '.join(others[:5])}" if others else None


def ledger_csv(statuses: Sequence[SlideStatus]) -> bytes:
    """One row a slide: status, reason, counts."""
    columns = ("slide_id", "uri", "status", "reason", "n_patches", "n_bad_tiles", "key")
    return table_csv(as_columns(statuses).table.select(columns))


def _check_budget(config: Config, bad: Sequence[SlideStatus], slides: int, ledger: str) -> None:
    """DataBudgetError where more of the slides are bad than may be."""
    allowed = config.tiling.max_bad_slides
    if allowed is None:
        allowed = max(1, int(_DEFAULT_BAD_SHARE * slides))
    if len(bad) > allowed:
        lines = "\n".join(f"  - {s.slide_id} ({s.uri}): {s.reason}" for s in bad[:SHOWN])
        if len(bad) > SHOWN:
            lines += f"\n  and {len(bad) - SHOWN:,} more, all in {ledger}"
        raise DataBudgetError(
            f"{len(bad)} of {slides} slides are quarantined and {allowed} are allowed:\n{lines}\n"
            f"The other {slides - len(bad)} are committed and kept. Mend or remove the bad ones, "
            f"or set tiling.max_bad_slides={len(bad)}"
        )


def _labelled(slides: Sequence[LabelledSource]) -> list[Any]:
    """Slides as what they give; one that was tiled or planned anew may have lost patches under the same key."""
    return [
        [slide.slide_id, slide.patient_id, stored.key, stored.n_patches, Labels(slide.labels)]
        for slide, stored in slides
    ]


def _train_identity(space: Workspace) -> Mapping[str, Any]:
    """Validation slides count where they choose the checkpoint; else they are only looked at on the way."""
    chooses, begins = space.config.train.keeps_best, space.config.train.begins_with
    return {
        "recipe": space.config.recipe(),
        "tiling": space.config.tiling.fingerprint(),
        "weights": _version_of_file(space.config.model.encoder.weights),
        **({} if begins is None else {"begins_with": _version_of_file(begins)}),
        "train": _labelled(space.stored("train")),
        "val": _labelled(space.stored("val")) if chooses else [],
    }


def _version_of_file(weights: str | None) -> Mapping[str, Any] | None:
    """Which version of a file of weights: another one under the same name is another recipe."""
    return None if weights is None else asdict(source_version(weights))


def _train(space: Workspace, stage_fingerprint: str, run_id: str) -> Record:
    from pipeline.training.driver import train

    check_apart(space.cohort, space.records["tile"].keys)
    slides, validation = space.stored("train"), space.stored("val")
    if not validation:
        log.warning(
            "train: no slide of the val split is committed, so nothing is validated on the way; write val into the "
            "cohort's split column, or raise cohort.split.val"
        )
    _warn_small_bags(space.config, [stored.n_patches for _, stored in slides])
    _warn_random_encoder(space.config)
    tracker, cohort = space.tracker(), space.cohort
    tracker.log_dataset(run_id, "cohort", cohort.digest, cohort.uri, "training")
    space.ray()
    with plans_mended(space.config):
        trained = train(space.config, slides, validation, stage_fingerprint, tracker, run_id, space.lease)
    facts: dict[str, Any] = {"train_slides": len(slides), "val_slides": len(validation)}
    if space.config.train.begins_with is None:  # of what other weights have learned from nothing is known here
        facts["learned"] = learned([*slides, *validation])
    outputs = {"checkpoint": trained.checkpoint, "weights": join(trained.checkpoint, WEIGHTS)}
    return Record("train", stage_fingerprint, outputs, trained.metrics, facts)


@contextmanager
def plans_mended(config: Config) -> Iterator[None]:
    """Inside, a plan that names a patch which cannot be decoded is removed, so that the next run makes another.

    Here and now the training cannot do without the patch: the slide's rows, and the steps drawn from them, would not
    be those of a store, where it never was.
    """
    try:
        yield
    except PlanError as error:
        patch_store(config).distrust(error.key)
        raise StageError(
            f"{error}. Run again: the tile stage then reads this slide whole and leaves such patches out, or the slide "
            "where they are over tiling.max_bad_tiles, as train.source=store does"
        ) from error


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


def _warn_random_encoder(config: Config) -> None:
    if config.train.freeze_encoder and config.model.encoder.weights is None:
        log.warning(
            "train.freeze_encoder keeps the encoder as it is drawn at random, since model.encoder.weights is null; "
            "give it weights, or unfreeze it"
        )


def _evaluate_identity(space: Workspace) -> Mapping[str, Any]:
    config = space.config
    return {
        "train": space.records["train"].fingerprint,
        "evaluate": config.evaluate.model_dump(),
        "slides": _labelled(space.stored(config.evaluate.split)),
    }


def _evaluate(space: Workspace, stage_fingerprint: str, run_id: str) -> Record:
    from pipeline.results.evaluate import write_cases
    from pipeline.results.report import render_report

    config, tracker = space.config, space.tracker()
    check_apart(space.cohort, space.records["tile"].keys)
    slides = space.stored(config.evaluate.split)
    tracker.log_dataset(run_id, "cohort", space.cohort.digest, space.cohort.uri, "evaluation")
    space.ray()
    trained = space.records["train"]
    with plans_mended(config):
        evaluation = cluster.call(
            evaluate_checkpoint,
            (config, trained.outputs["checkpoint"], slides, thresholds(trained.metrics)),
            cpus=config.cluster.cpus_per_worker,
            gpus=config.cluster.gpus_per_worker,
            timeout_s=config.cluster.start_timeout_s,
            advice=f"where memory is short, lower model.select.chunk={config.model.select.chunk} or train.score_batch",
        )
    folder = join(config.storage.root, "reports", f"{config.name}-{stage_fingerprint}")
    origin = {"evaluated": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "model": str(config.tracking.model)}
    origin |= {"checkpoint": trained.outputs["checkpoint"], "mlflow_run": run_id, "versions": versions()}
    page = render_report(evaluation, config, space.cohort, {**origin, **space.lineage})
    texts = {"report.html": page, "predictions.csv": table_csv(evaluation.predictions).decode()}
    for name, text in texts.items():
        write_bytes(join(folder, name), text.encode())
        tracker.log_text(run_id, text, name)
    outputs = {name.partition(".")[0]: join(folder, name) for name in texts} | write_cases(evaluation, folder)
    tracker.log_metrics(run_id, evaluation.metrics, 0)
    return Record("evaluate", stage_fingerprint, outputs, evaluation.metrics, {"slides": len(slides)})


def evaluate_checkpoint(
    config: Config, checkpoint: str, slides: Sequence[LabelledSource], cuts: Mapping[str, float]
) -> Evaluation:
    """Evaluate a checkpoint folder, given by URI; runs as a Ray task, on a GPU where the config asks for one."""
    from pipeline.inference.prediction import load_model
    from pipeline.results.evaluate import evaluate

    with model_folder(checkpoint) as folder:
        model, _ = load_model(folder)
    return evaluate(model, config, slides, cuts)


STAGES: tuple[Stage, ...] = (
    Stage("tile", _tile_identity, _tile, _tiles_outdated, shared=True, layout=2),  # a slide's commit is whole or absent
    Stage("train", _train_identity, _train),
    Stage("evaluate", _evaluate_identity, _evaluate),
    Stage("register", register.identity, register.register, register.outdated),
)
"""In the order of the data's way."""
