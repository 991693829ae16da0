"""Runs the stages that are not done, says why, and records each as a child of one MLflow run per invocation."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import telemetry
from pipeline.bags.images import cohort_csv
from pipeline.cluster import connected
from pipeline.cohort.folds import with_fold
from pipeline.cohort.patients import bag_name, check_agreement, check_specimens
from pipeline.cohort.recorded import read_recorded, record
from pipeline.cohort.splits import check_apart, check_trainable, with_splits
from pipeline.cohort.table import Cohort, read_cohort
from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.demo.cohort import write_demo
from pipeline.errors import ConfigError, StageError
from pipeline.ingest.cohorts import listed
from pipeline.logs import about, within
from pipeline.model.build import check_weights
from pipeline.storage.files import (
    exists,
    is_remote,
    join,
    list_names,
    read_bytes,
    read_json,
    upload,
    write_bytes,
    write_json,
)
from pipeline.storage.lease import held, joined
from pipeline.storage.tree import upload_tree
from pipeline.tiling.guide import check_environment
from pipeline.tracking.tracker import Tracker
from pipeline.workflow.changes import changes, items
from pipeline.workflow.embed import stages_for
from pipeline.workflow.lineage import Tracking, lineage
from pipeline.workflow.stage import Record, Stage, Workspace, slide_tags

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """What would happen to one stage, and why."""

    stage: str
    action: str
    """run, skip, or unknown (an earlier stage decides)."""
    why: str
    fingerprint: str | None


@dataclass(frozen=True)
class StageResult:
    """What happened to one stage."""

    record: Record
    outcome: str
    """done or skipped."""


@dataclass(frozen=True)
class WorkflowResult:
    """What one invocation did."""

    stages: Mapping[str, StageResult]
    parent_run_id: str | None
    """The MLflow run of this invocation; None when no stage had to run."""

    @property
    def outcome(self) -> str:
        """done, or nothing to do."""
        return "done" if self.parent_run_id else "nothing to do"


def run(
    config: Config,
    last: str = "register",
    more: Sequence[Stage] = (),
    choose: Callable[[Cohort], Cohort] = lambda cohort: cohort,
) -> WorkflowResult:
    """Bring every stage up to and including `last` up to date; stages that are done cost nothing.

    Args:
        config: of the run.
        last: name of a stage.
        more: stages that come after it.
        choose: takes the splits from slides that are not to be used, once they are drawn and recorded.
    """
    about(run=None)
    ensure_cohort(config)
    with ExitStack() as stack:
        tracking = Tracking(config, stack)
        needs_labels = last not in ("tile", "embed")
        cohort = load_cohort(config, needs_labels=needs_labels)
        if needs_labels:
            _record_splits(config, cohort)
        cohort = choose(cohort)
        tracking.lineage = {**lineage(config), "cohort_digest": cohort.digest}
        space = Workspace(
            config,
            cohort,
            tracking.tracker,
            lambda: stack.enter_context(connected(config.cluster)),
            tracking.lineage,
        )
        results: dict[str, StageResult] = {}
        for stage in (*stages_for(config, last), *more):
            with within(stage=stage.name):
                results[stage.name] = _bring_up(stage, space, tracking, last)
            space.records[stage.name] = results[stage.name].record
        tracking.sum_up(space.records.values())
        return WorkflowResult(results, tracking.parent)


def plan(config: Config, last: str = "register") -> list[Planned]:
    """What `run` would do, and why; changes nothing."""
    missing = _missing_cohort(config)
    if missing is not None:
        first = Planned("demo" if config.cohort.demo is not None else "megapixel_mnist", "run", missing, None)
        return [first, *(Planned(s.name, "unknown", "needs the cohort", None) for s in stages_for(config, last))]
    cohort = load_cohort(config, needs_labels=last not in ("tile", "embed"))
    space = Workspace(config, cohort, _no_tracker, _no_ray, {})
    planned: list[Planned] = []
    for stage in stages_for(config, last):
        if any(item.action != "skip" for item in planned):
            planned.append(Planned(stage.name, "unknown", f"needs {planned[-1].stage}", None))
            continue
        identity = stage.identity(space)
        stage_fingerprint = fingerprint(identity)
        record, why = _find(space, stage, identity, stage_fingerprint)
        if record is not None:
            space.records[stage.name] = record
        planned.append(Planned(stage.name, "run" if record is None else "skip", why, stage_fingerprint))
    return planned


def finished(config: Config, last: str) -> Record:
    """The record of a stage that is done and unchanged, as are those before it; changes nothing.

    Raises:
        StageError: it is not.
    """
    cohort = load_cohort(config, needs_labels=last not in ("tile", "embed"))
    space = Workspace(config, cohort, _no_tracker, _no_ray, {})
    for stage in stages_for(config, last):
        identity = stage.identity(space)
        record, why = _find(space, stage, identity, fingerprint(identity))
        if record is None:
            raise StageError(f"{config.name}: the stage {stage.name} has to run first ({why}); use `pipeline {last}`")
        space.records[stage.name] = record
    return space.records[last]


def ensure_cohort(config: Config) -> None:
    """Write the cohort where the config asks for a generated one and it is not there."""
    if _missing_cohort(config) is None:
        return
    if config.cohort.megapixel_mnist is not None:
        write_bytes(config.cohort.uri, cohort_csv(config.cohort.megapixel_mnist))
        return
    assert config.cohort.demo is not None
    folder, _, _ = config.cohort.uri.rpartition("/")
    log.info("demo: writing %d slides to %s", config.cohort.demo.slides, folder)
    if not is_remote(folder):
        write_demo(folder, config.cohort.demo)
        return
    with tempfile.TemporaryDirectory() as scratch:
        cohort = write_demo(scratch, config.cohort.demo)
        upload_tree(Path(scratch) / "slides", join(folder, "slides"))
        upload(Path(cohort), config.cohort.uri)  # last: a cohort that is there is whole


def _missing_cohort(config: Config) -> str | None:
    """Why the generated cohort must be written; None where it is there, or the config has its own."""
    images = config.cohort.megapixel_mnist
    if images is None and config.cohort.demo is None:
        return None
    if not exists(config.cohort.uri):
        return f"{config.cohort.uri} is absent"
    if images is not None and read_bytes(config.cohort.uri) != cohort_csv(images):
        return f"{config.cohort.uri} is not that of cohort.megapixel_mnist"
    return None


def load_cohort(config: Config, *, needs_labels: bool) -> Cohort:
    """The cohort with its splits; labels are checked where a stage needs them."""
    cohort = listed(config, config.tasks if needs_labels else ())
    check_environment(cohort.slides, config.tiling)
    if not needs_labels:
        return cohort
    cohort = split_as_asked(config, cohort)
    splits = ["train", config.evaluate.split]
    if config.train.keeps_best and "val" not in splits:
        splits.append("val")  # by which early stopping and the best checkpoint go
    if config.cohort.bag == "patient":
        check_specimens(cohort.uri, cohort.slides, config.cohort.specimen)
        check_agreement(cohort, config.tasks, config.cohort.specimen)
    check_trainable(cohort, config.tasks, splits)
    check_apart(cohort)
    return cohort


def split_as_asked(config: Config, cohort: Cohort) -> Cohort:
    """With the splits that it has, that were recorded or drawn by the config, or those of a fold."""
    folds, fold = config.train.folds, config.train.fold
    if folds is None:
        recorded = read_recorded(config.storage.root)
        return with_splits(cohort, config.cohort.split, config.seed, recorded, config.retrain.new_patients)
    if fold is None:
        problem = f"train.folds={folds}: this command knows one training; use `pipeline sweep folds`, or set train.fold"
        raise ConfigError("config", [problem])
    return with_fold(cohort, folds, fold, config.cohort.split, config.seed, config.tasks)


def _record_splits(config: Config, cohort: Cohort) -> None:
    """Where the splits were drawn, so that patients keep theirs; those of a fold are its own."""
    if config.train.folds is None and not read_cohort(config.cohort.uri).has_splits:
        root = config.storage.root
        record(root, cohort, config.cohort.split, config.seed, read_recorded(root))


def _no_tracker() -> Tracker:
    raise AssertionError("planning opens no tracker")


def _no_ray() -> None:
    raise AssertionError("planning starts no Ray")


def _bring_up(stage: Stage, space: Workspace, tracking: Tracking, last: str) -> StageResult:
    identity = stage.identity(space)
    stage_fingerprint = fingerprint(identity)
    found, why = _find(space, stage, identity, stage_fingerprint)
    if found is not None:
        log.info("%s: %s (%s)", stage.name, why, stage_fingerprint)
        return StageResult(found, "skipped")
    log.info("%s: running, %s (%s)", stage.name, why, stage_fingerprint)
    if tracking.parent is None:
        _check_weights(space.config, last)
    began = time.monotonic()
    lease = join(space.config.storage.root, "stages", f"{stage.name}-{stage_fingerprint}.lease")
    claimed = (joined if stage.shared else held)(lease, f"{stage.name} of {space.config.name}")
    with (
        claimed as space.lease,
        tracking.child(stage.name, stage_fingerprint, slide_tags(space), alone=space.lease is not None) as run_id,
    ):
        telemetry.drain()
        record = stage.work(space, stage_fingerprint, run_id)
        space.look_again()
        record = _timed(record, run_id, began)
        space.tracker().log_metrics(run_id, {f"{kind}_s": s for kind, s in record.facts["work"].items()}, 0)
        if record.facts.get("try_again"):  # slides that could not be reached: not done, so the next run tries them
            return StageResult(record, "done")
        facts = {**record.facts, "identity": _digests(identity), "items": items(identity), "finished": time.time()}
        facts["layout"] = stage.layout
        write_json(_record_uri(space.config, stage.name, stage_fingerprint), asdict(replace(record, facts=facts)))
    log.info("%s: done in %.0f s", stage.name, record.seconds)
    return StageResult(record, "done")


def _timed(record: Record, run_id: str, began: float) -> Record:
    """The record of a stage that is done, with its seconds, and in `work` those of all its tasks by kind."""
    seconds = round(time.monotonic() - began, 1)
    telemetry.level("ips_stage_seconds", seconds, stage=record.stage)
    facts = {**record.facts, "work": telemetry.seconds(telemetry.drain())}
    return replace(record, run_id=run_id, seconds=seconds, facts=facts)


def _check_weights(config: Config, last: str) -> None:
    """Tell what departs from presets, and refuse weights that do not fit: tiling takes hours, Ray half a minute."""
    names = [stage.name for stage in stages_for(config, last)]
    for departure in config.departures():
        log.warning("%s; features are worth most as the encoder was trained", departure)
    if "embed" in names and config.embed is not None:
        check_weights("embed.encoder", config.embed.encoder)
    if "train" in names:
        check_weights("model.encoder", config.model.encoder)


def _record_uri(config: Config, stage: str, stage_fingerprint: str) -> str:
    return join(config.storage.root, "stages", f"{stage}-{stage_fingerprint}.json")


def _find(
    space: Workspace, stage: Stage, identity: Mapping[str, Any], stage_fingerprint: str
) -> tuple[Record | None, str]:
    """The record of a finished stage that still holds, and why it is skipped; or None, and why it has to run."""
    uri = _record_uri(space.config, stage.name, stage_fingerprint)
    if not exists(uri):
        return None, _changes(space, stage, identity)
    record = Record(**read_json(uri))
    missing = [output for output in record.outputs.values() if not exists(output)]
    if missing:
        return None, f"its record stands, but {', '.join(missing)} is gone"
    outdated = stage.outdated(space, record)
    return (record, "done and unchanged") if outdated is None else (None, outdated)


def _records(config: Config, stage: str) -> list[Record]:
    folder = join(config.storage.root, "stages")
    names = [name for name in list_names(folder) if name.startswith(f"{stage}-") and name.endswith(".json")]
    return [Record(**read_json(join(folder, name))) for name in names]


def _digests(identity: Mapping[str, Any]) -> dict[str, str]:
    return {key: fingerprint(value) for key, value in identity.items()}


def _changes(space: Workspace, stage: Stage, identity: Mapping[str, Any]) -> str:
    """What changed since the newest record of the stage."""
    records = _records(space.config, stage.name)
    if not records:
        return "never done before"
    newest = max(records, key=_finished)
    before: Mapping[str, str] = newest.facts["identity"]
    known, now = newest.facts.get("items", {}), items(identity)
    ids = {slide.slide_id for slide in space.cohort.slides}
    if space.config.cohort.bag == "patient":
        ids |= {bag_name(slide, space.config.cohort.specimen) for slide in space.cohort.slides}
    ids.update(*map(_named, sorted(_records(space.config, "tile"), key=_finished)[-2:]))  # who is gone since was there
    same = newest.facts.get("layout", 1) == stage.layout
    parts = [key for key, digest in _digests(identity).items() if before.get(key) != digest]
    changed = [told for key in parts if (told := changes(key, known, now, ids, same_layout=same))]
    reasons = [] if same else ["identified otherwise by the release that did it last"]
    return "; ".join([*reasons, *([f"changed since the last time: {', '.join(changed)}"] if changed else [])])


def _finished(record: Record) -> float:
    return float(record.facts["finished"])


def _named(record: Record) -> list[str]:
    """The slides of a tile stage whose ledger is still there, by id."""
    there = all(exists(record.outputs[name]) for name in ("ledger_slides",) if name in record.outputs)
    return list(record.tiled["slide_id"].to_pylist()) if there else []
