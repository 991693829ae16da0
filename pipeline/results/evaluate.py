"""The test: predict every slide of a split, then metrics with intervals that respect patients."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from ips.network.model import IPSModel
from pipeline.bags.sources import LabelledSource, open_bag
from pipeline.cohort.labels import NONE, Label, lacks, truth
from pipeline.config.data import TaskConfig
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.inference.intervals import Interval, bootstrap, floor, interval, task_intervals
from pipeline.inference.metrics import MEASURES, Floats, Ints, confusion, expected_time, measure, roc_points
from pipeline.inference.prediction import BagPrediction, bag_scorer, predict_bag

log = logging.getLogger(__name__)

Slides = Sequence[LabelledSource]


@dataclass(frozen=True)
class TaskResult:
    """One task over the slides that have a label for it."""

    task: TaskConfig
    slides: Ints
    """(n,) places of these slides among all evaluated ones."""
    labels: tuple[Label, ...]
    """Of these slides, as the cohort has them."""
    truth: Floats
    """(n,) or (n, W), see `labels.truth`."""
    values: Floats
    """(n, K), one number for each of the task's outputs."""
    predicted: tuple[Label, ...]
    """What is predicted, in the form of the labels; of survival, the expected time until the last bin's end."""
    measures: Mapping[str, Interval]
    """The task's `MEASURES`."""
    confusion: Ints | None
    """(K, K): row = true class, column = predicted class; binary and multiclass only."""
    roc: Mapping[str, tuple[Floats, Floats]]
    """Class or label -> false and true positive rates, against the rest; binary: of the positive class."""


@dataclass(frozen=True)
class Evaluation:
    """All that is known of one model on one split."""

    split: str
    slides: tuple[LabelledSource, ...]
    found: tuple[BagPrediction, ...]
    """Of every slide, in the order of `slides`."""
    tasks: tuple[TaskResult, ...]
    measures: Mapping[str, Interval]
    """Means over the tasks that have the measure; `mae` has a unit, so it is there for a single task only."""
    predictions: pa.Table
    """One row a slide: slide_id, uri, patient_id, n_patches, and of each task <task>_label (null where missing),
    <task>_predicted and <task>_<output>."""
    seconds: float
    """That the prediction of one slide took, mean."""

    @property
    def metrics(self) -> dict[str, float]:
        """Flat metrics, prefixed with the split: test_auc, test_auc_low, test_auc_high, test_accuracy, ...

        The ends are of each measure over all tasks; those of one task of several stand in its `measures`.
        """
        values = {name: found.value for name, found in self.measures.items()}
        for name, found in self.measures.items():
            values |= {f"{name}_low": found.low, f"{name}_high": found.high}
        values |= {
            "slides": float(len(self.slides)),
            "patients": float(len({slide.patient_id for slide, _ in self.slides})),
        }
        if len(self.tasks) > 1:
            for result in self.tasks:
                values |= {f"{name}_{result.task.name}": found.value for name, found in result.measures.items()}
        return {f"{self.split}_{name}": value for name, value in values.items()}


def evaluate(model: IPSModel, config: Config, slides: Slides) -> Evaluation:
    """Predict committed slides of the split `config.evaluate.split` and measure.

    Intervals are those of `intervals`, the bootstrap seeded with `config.seed`; the means over several tasks are
    resampled jointly.

    Raises:
        StageError: no slides, a task whose labels cannot be measured against, or a model that gives no numbers.
    """
    split = config.evaluate.split
    if not slides:
        raise StageError(f"evaluate: no slide of split {split!r} is committed; tile the cohort or set evaluate.split")
    labels = {task.name: [slide.labels.get(task.name) for slide, _ in slides] for task in config.tasks}
    _check_labels(config, labels)
    began = time.monotonic()
    found = _predict(model, config, slides)
    seconds = (time.monotonic() - began) / len(slides)
    _check_finite(slides, found)
    truths = [np.array([truth(task, label) for label in labels[task.name]]) for task in config.tasks]
    values = [np.stack([one.values[task.name] for one in found]) for task in config.tasks]

    def statistic(chosen: Ints) -> Floats:
        pairs = zip(config.tasks, values, truths, strict=True)
        each = [measure(task, p[chosen], y[chosen]) for task, p, y in pairs]
        return np.concatenate([_overall(config.tasks, each), *each])

    whole = statistic(np.arange(len(slides)))
    patients = [slide.patient_id for slide, _ in slides]
    drawn = bootstrap(statistic, patients, config.evaluate.bootstrap, config.seed)
    names = _overall_names(config.tasks)
    at, results = len(names), []
    for task, p, y in zip(config.tasks, values, truths, strict=True):
        end = at + len(MEASURES[task.kind])
        found_here = task_intervals(task, y, patients, whole[at:end].tolist(), drawn[:, at:end])
        measures = dict(zip(MEASURES[task.kind], found_here, strict=True))
        results.append(_result(task, labels[task.name], p, y, measures))
        at = end
    overall = {
        name: _mean_interval(name, results, float(whole[place]), drawn[:, place], truths, patients)
        for place, name in enumerate(names)
    }
    table = _table(slides, config.tasks, labels, values)
    return Evaluation(split, tuple(slides), found, tuple(results), overall, table, seconds)


def _check_finite(slides: Slides, found: Sequence[BagPrediction]) -> None:
    """What is no number would be ranked above all numbers, and so measured as if it were right."""
    broken = [
        slide.slide_id
        for (slide, _), one in zip(slides, found, strict=True)
        if not all(np.isfinite(values).all() for values in one.values.values())
    ]
    if broken:
        raise StageError(
            f"evaluate: the model's prediction is not finite for {len(broken)} of {len(slides)} slides, such as "
            f"{broken[0]}; its weights or the slide's features hold such values"
        )


def _check_labels(config: Config, labels: Mapping[str, Sequence[Label | None]]) -> None:
    for task in config.tasks:
        reason = lacks(task, labels[task.name])
        if reason is not None:
            raise StageError(
                f"evaluate: the {len(labels[task.name])} slides of split {config.evaluate.split!r} have, for task "
                f"{task.name!r}, {reason}, or choose evaluate.split"
            )


def _overall_names(tasks: Sequence[TaskConfig]) -> tuple[str, ...]:
    names = dict.fromkeys(name for task in tasks for name in MEASURES[task.kind])
    return tuple(name for name in names if name != "mae" or len(tasks) == 1)


def _overall(tasks: Sequence[TaskConfig], each: Sequence[tuple[float, ...]]) -> Floats:
    """Mean of each measure over the tasks that have it."""
    pairs = [
        (name, value)
        for task, found in zip(tasks, each, strict=True)
        for name, value in zip(MEASURES[task.kind], found, strict=True)
    ]
    return np.array([np.mean([value for name, value in pairs if name == wanted]) for wanted in _overall_names(tasks)])


def _mean_interval(
    name: str,
    results: Sequence[TaskResult],
    value: float,
    resampled: Floats,
    truths: Sequence[Floats],
    patients: Sequence[str],
) -> Interval:
    """Of the mean of a measure over the tasks that have it; of one task, its own."""
    those = [(result, y) for result, y in zip(results, truths, strict=True) if name in result.measures]
    if len(those) == 1:
        return those[0][0].measures[name]
    floors = [found for result, y in those if (found := floor(result.task, name, y, patients)) is not None]
    return interval(value, resampled, float(np.mean(floors)) if floors else None)


def _predict(model: IPSModel, config: Config, slides: Slides) -> tuple[BagPrediction, ...]:
    scorer, found = bag_scorer(model, config), []
    for number, (_, source) in enumerate(slides, start=1):
        bag = open_bag(source, threads=torch.get_num_threads(), augment=None)
        found.append(predict_bag(model, bag, config, scorer))
        if number % max(1, len(slides) // 5) == 0:
            log.info("evaluate: %d/%d slides", number, len(slides))
    return tuple(found)


def _predicted(task: TaskConfig, values: Floats) -> list[Label]:
    """(n, K) -> n predictions in the form of labels."""
    if task.kind == "multilabel":
        held = [[name for name, p in zip(task.classes, row, strict=True) if p >= 0.5] for row in values]
        return [";".join(names) or NONE for names in held]
    if task.kind == "regression":
        return [float(value) for value in values[:, 0]]
    if task.kind == "survival":
        return [float(value) for value in expected_time(values, task.bins)]
    return [task.classes[k] for k in values.argmax(axis=1)]


def _result(
    task: TaskConfig, labels: Sequence[Label | None], values: Floats, truths: Floats, measures: Mapping[str, Interval]
) -> TaskResult:
    known = np.array([place for place, label in enumerate(labels) if label is not None], np.int64)
    p, y = values[known], truths[known]
    classes = task.kind in ("binary", "multiclass")
    return TaskResult(
        task=task,
        slides=known,
        labels=tuple(label for label in labels if label is not None),
        truth=y,
        values=p,
        predicted=tuple(_predicted(task, p)),
        measures=measures,
        confusion=confusion(p, y.astype(np.int64)) if classes else None,
        roc=_curves(task, p, y),
    )


def _curves(task: TaskConfig, values: Floats, truths: Floats) -> dict[str, tuple[Floats, Floats]]:
    """ROC of every class or label that some slides have and others do not."""
    if task.kind in ("regression", "survival"):
        return {}
    held = truths == 1 if task.kind == "multilabel" else truths[:, None] == np.arange(len(task.classes))
    shown = task.classes[1:] if task.kind == "binary" else task.classes
    return {
        name: roc_points(values[:, k], held[:, k])
        for k, name in enumerate(task.classes)
        if name in shown and 0 < held[:, k].sum() < len(held)
    }


def _table(
    slides: Slides, tasks: Sequence[TaskConfig], labels: Mapping[str, Sequence[Label | None]], values: Sequence[Floats]
) -> pa.Table:
    columns: dict[str, object] = {
        "slide_id": [slide.slide_id for slide, _ in slides],
        "uri": [slide.uri for slide, _ in slides],
        "patient_id": [slide.patient_id for slide, _ in slides],
        "n_patches": [stored.n_patches for _, stored in slides],
    }
    for task, numbers in zip(tasks, values, strict=True):
        kind = pa.float64() if task.kind == "regression" else pa.string()
        columns[task.result_columns["label"]] = pa.array(labels[task.name], kind)
        columns[task.result_columns["prediction"]] = _predicted(task, numbers)
        columns |= {column: numbers[:, k] for k, column in enumerate(task.output_columns)}
    return pa.table(columns)
