"""Cross-validation of a recipe: a training for each fold, and what all folds say of the patients they did not train on.

Each fold is an ordinary run of the recipe with `train.fold` set: its checkpoint, when it stops and its threshold follow
its own validation slides, which are drawn from its training patients. Slides are tiled once. Finished folds are not
done again; those that are left run side by side where the cluster holds several. Each fold's model becomes a version,
and all of them together one more, which gives their mean.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from pipeline.cluster import connected
from pipeline.cohort.folds import fold_names
from pipeline.cohort.labels import stratum, truth
from pipeline.cohort.table import Cohort
from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError
from pipeline.inference.intervals import Interval
from pipeline.inference.measured import measured
from pipeline.inference.operating import thresholds
from pipeline.inference.resampling import draw_plan
from pipeline.ingest.cohorts import listed
from pipeline.results.tables import table_csv, unarmed
from pipeline.storage.files import join, read_bytes, write_bytes, write_json
from pipeline.tracking.tracker import open_tracking
from pipeline.workflow.lineage import lineage
from pipeline.workflow.register import ENTER, trained_folder
from pipeline.workflow.run import ensure_cohort, load_cohort
from pipeline.workflow.run import run as run_workflow
from pipeline.workflow.side_by_side import Asked, run_all
from pipeline.workflow.stage import Record

_RESAMPLES = 2000


@dataclass(frozen=True)
class Fold:
    """One fold, trained and tested."""

    name: str
    checkpoint: str
    metrics: Mapping[str, float]
    """Of its own test slides."""
    thresholds: Mapping[str, float]
    """Binary task -> the score from which it calls positive, by its validation slides."""
    slides: int
    """That it tested."""


@dataclass(frozen=True)
class FoldsResult:
    """A cross-validation."""

    folds: tuple[Fold, ...]
    measures: Mapping[str, Mapping[str, Interval]]
    """Task -> measure -> over all patients, each predicted by the fold that did not know him."""
    scores: Mapping[str, Mapping[str, float]]
    """Task -> all that is measured of the same predictions."""
    outputs: Mapping[str, str]
    """Name -> URI."""
    versions: tuple[str, ...]
    """models:/NAME/VERSION of each fold."""
    ensemble: str
    """models:/NAME-ensemble/VERSION: their mean."""


def fold_config(config: Config, fold: int) -> Config:
    """The recipe of one fold."""
    return config.model_copy(update={"train": config.train.model_copy(update={"fold": fold})})


def run_folds(config: Config) -> FoldsResult:
    """Train and test every fold that is not done, put their predictions together, and register their models.

    Raises:
        ConfigError: the recipe has no folds.
        CohortError: the cohort cannot be parted so.
        PipelineError: what a fold's run raises; the others go on at the next call.
    """
    if config.train.folds is None:
        raise ConfigError("config", ["train.folds: is required; set how many, or the column that names them"])
    ensure_cohort(config)
    cohort = listed(config, config.tasks)
    asked = [
        Asked(f"fold {name}", fold_config(config, n)) for n, name in enumerate(fold_names(cohort, config.train.folds))
    ]
    with connected(config.cluster):
        run_workflow(config, "embed" if config.model.encoder.name == "features" else "tile")
        records = run_all(asked, "evaluate", "folds")
    folds = [_fold(one.name.removeprefix("fold "), found) for one, found in zip(asked, records, strict=True)]
    parts = [_predictions(one.config, found, fold.name) for one, found, fold in zip(asked, records, folds, strict=True)]
    result = _together(config, cohort, folds, pa.concat_tables(parts))
    entered = [run_workflow(one.config, "evaluate", [ENTER]).stages["enter"].record for one in asked]
    versions = tuple(str(record.facts["uri"]) for record in entered)
    return replace(result, versions=versions, ensemble=_ensemble(config, cohort, result, versions))


def _fold(name: str, records: Mapping[str, Record]) -> Fold:
    train, evaluated = records["train"], records["evaluate"]
    chosen = thresholds(train.metrics)
    return Fold(name, train.outputs["checkpoint"], evaluated.metrics, chosen, evaluated.facts["slides"])


def _predictions(config: Config, records: Mapping[str, Record], name: str) -> pa.Table:
    """A fold's own test: slide_id, patient_id, fold and the tasks' outputs."""
    columns = [column for task in config.tasks for column in task.output_columns]
    types = {"slide_id": pa.string(), "patient_id": pa.string(), **dict.fromkeys(columns, pa.float64())}
    found = csv.read_csv(
        pa.BufferReader(read_bytes(records["evaluate"].outputs["predictions"])),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=types, include_columns=["slide_id", *columns]),
    )
    tested = {unarmed(slide.slide_id): slide for slide in load_cohort(config, needs_labels=True).subset("test")}
    slides = [tested[name] for name in found["slide_id"].to_pylist()]
    own = {
        "slide_id": pa.array([slide.slide_id for slide in slides], pa.string()),
        "patient_id": pa.array([slide.patient_id for slide in slides], pa.string()),
        "fold": pa.array([name] * len(slides), pa.string()),
    }
    return pa.table({**own, **{column: found[column] for column in columns}})


def _together(config: Config, cohort: Cohort, folds: Sequence[Fold], table: pa.Table) -> FoldsResult:
    slides = {slide.slide_id: slide for slide in cohort.slides}
    own = [slides[name] for name in table["slide_id"].to_pylist()]
    patients, first = [slide.patient_id for slide in own], config.tasks[0]
    plan = draw_plan(patients, [stratum(first, slide.labels[first.name]) for slide in own], _RESAMPLES, config.seed)
    weights = plan.weights(patients)
    measures: dict[str, Mapping[str, Interval]] = {}
    found: dict[str, Mapping[str, float]] = {}
    for task in config.tasks:
        values = np.stack([table[column].to_numpy() for column in task.output_columns], axis=1)
        y = np.array([truth(task, slide.labels[task.name]) for slide in own])
        own_measures = measured(task, values, y, patients, weights)
        measures[task.name], found[task.name] = own_measures.measures, own_measures.scores
    folder = join(config.storage.root, "folds", f"{config.name}-{fingerprint([asdict(fold) for fold in folds])}")
    names = ("predictions.parquet", "predictions.csv", "resamples.parquet", "folds.json")
    outputs = {name: join(folder, name) for name in names}
    write_bytes(outputs["predictions.parquet"], _parquet(table))
    write_bytes(outputs["predictions.csv"], table_csv(table))
    write_bytes(outputs["resamples.parquet"], _parquet(plan.table()))
    told: dict[str, Any] = {"folds": [asdict(fold) for fold in folds], "scores": found}
    told["measures"] = {task: {name: asdict(one) for name, one in each.items()} for task, each in measures.items()}
    write_json(outputs["folds.json"], told)
    return FoldsResult(tuple(folds), measures, found, outputs, (), "")


def _ensemble(config: Config, cohort: Cohort, result: FoldsResult, versions: Sequence[str]) -> str:
    """The mean of all folds' models as a version; made, with a run that says what they measure, where there is none."""
    from pipeline.tracking.registry import find_registered, register_model  # loads in seconds

    tracking, root = config.tracking, config.storage.root
    assert tracking.uri is not None  # compose.py fills both
    assert tracking.experiment is not None
    tracker = open_tracking(tracking.uri, tracking.experiment, join(root, "artifacts"))
    name, mark = f"{tracking.model}-ensemble", {"members": ", ".join(versions), "folds": str(config.train.folds)}
    if (there := find_registered(tracker, name, mark)) is not None:
        return there.uri
    tags = {**lineage(config), **mark, "cohort_digest": cohort.digest, "kind": "folds"}
    with tracker.run(f"{config.name} folds", tags=tags) as run_id, ExitStack() as stack:
        tracker.log_text(run_id, read_bytes(result.outputs["folds.json"]).decode(), "folds.json")
        made = register_model(
            tracker,
            name,
            [stack.enter_context(trained_folder(fold.checkpoint)) for fold in result.folds],
            run_id,
            tags=tags,
            metrics=_flat(config, result),
            example_uri=cohort.slides[0].uri,
            description=f"The mean of {len(versions)} models, each of which knows all folds but one: {mark['members']}",
        )
    return made.uri


def _flat(config: Config, result: FoldsResult) -> dict[str, float]:
    """All that is measured over the patients of all folds; of several tasks under the task's name."""
    several = len(config.tasks) > 1
    return {
        f"folds_{name}_{task}" if several else f"folds_{name}": value
        for task, found in result.scores.items()
        for name, value in found.items()
    }


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
