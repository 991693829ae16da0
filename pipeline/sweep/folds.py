"""Cross-validation of a recipe: a training for each fold, and what all folds say of the patients they did not train on.

Each fold is an ordinary run of the recipe with `train.fold` set: its checkpoint, when it stops and its threshold follow
its own validation slides, which are drawn from its training patients. Slides are tiled once. Finished folds are not
done again.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from pipeline.workflow.run import StageResult, ensure_cohort, load_cohort
from pipeline.workflow.run import run as run_workflow

log = logging.getLogger(__name__)

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


def fold_config(config: Config, fold: int) -> Config:
    """The recipe of one fold."""
    return config.model_copy(update={"train": config.train.model_copy(update={"fold": fold})})


def run_folds(config: Config) -> FoldsResult:
    """Train and test every fold that is not done, and put their predictions together.

    Raises:
        ConfigError: the recipe has no folds.
        CohortError: the cohort cannot be parted so.
    """
    if config.train.folds is None:
        raise ConfigError("config", ["train.folds: is required; set how many, or the column that names them"])
    ensure_cohort(config)
    cohort = listed(config, config.tasks)
    names = fold_names(cohort, config.train.folds)
    folds, parts = [], []
    with connected(config.cluster):
        run_workflow(config, "tile")
        for number, name in enumerate(names):
            own = fold_config(config, number)
            log.info("folds: %s, %d of %d", name, number + 1, len(names))
            stages = run_workflow(own, "evaluate").stages
            folds.append(_fold(name, stages))
            parts.append(_predictions(own, stages, name))
    table = pa.concat_tables(parts)
    return _together(config, cohort, folds, table)


def _fold(name: str, stages: Mapping[str, StageResult]) -> Fold:
    train, evaluated = stages["train"].record, stages["evaluate"].record
    chosen = thresholds(train.metrics)
    return Fold(name, train.outputs["checkpoint"], evaluated.metrics, chosen, evaluated.facts["slides"])


def _predictions(config: Config, stages: Mapping[str, StageResult], name: str) -> pa.Table:
    """A fold's own test: slide_id, patient_id, fold and the tasks' outputs."""
    columns = [column for task in config.tasks for column in task.output_columns]
    types = {"slide_id": pa.string(), "patient_id": pa.string(), **dict.fromkeys(columns, pa.float64())}
    found = csv.read_csv(
        pa.BufferReader(read_bytes(stages["evaluate"].record.outputs["predictions"])),
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
    return FoldsResult(tuple(folds), measures, found, outputs)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
