"""The test: predict every slide of a split, then metrics with intervals that respect patients."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from ips.model import IPSModel
from ips.scorer import Scorer
from pipeline.bags import PatchBag
from pipeline.cohort import CohortSlide
from pipeline.config import Config
from pipeline.config_data import TaskConfig
from pipeline.errors import StageError
from pipeline.inference import BagPrediction, predict_bag
from pipeline.metrics import (
    Floats,
    Interval,
    Ints,
    accuracy,
    bootstrap,
    check_labels,
    confusion,
    interval,
    roc_points,
    task_auc,
)
from pipeline.patches import StoredSlide

log = logging.getLogger(__name__)

Slides = Sequence[tuple[CohortSlide, StoredSlide]]


@dataclass(frozen=True)
class TaskResult:
    """One task over the slides that have a label for it."""

    task: TaskConfig
    slides: Ints
    """(n,) places of these slides among all evaluated ones."""
    labels: Ints
    """(n,) true class."""
    probabilities: Floats
    """(n, K)."""
    auc: Interval
    accuracy: Interval
    confusion: Ints
    """(K, K): row = true class, column = predicted class."""
    roc: Mapping[str, tuple[Floats, Floats]]
    """Class -> false and true positive rates, of that class against the rest; binary: of the positive class."""


@dataclass(frozen=True)
class Evaluation:
    """All that is known of one model on one split."""

    split: str
    slides: tuple[tuple[CohortSlide, StoredSlide], ...]
    found: tuple[BagPrediction, ...]
    """Of every slide, in the order of `slides`."""
    tasks: tuple[TaskResult, ...]
    auc: Interval
    """Mean over the tasks."""
    accuracy: Interval
    """Mean over the tasks."""
    predictions: pa.Table
    """One row a slide: slide_id, uri, patient_id, n_patches, and of each task <task>_label (null where missing),
    <task>_predicted and <task>_<class>."""

    @property
    def metrics(self) -> dict[str, float]:
        """Flat metrics, prefixed with the split: test_auc, test_auc_low, test_auc_high, test_accuracy, ..."""
        values = {
            "auc": self.auc.value,
            "auc_low": self.auc.low,
            "auc_high": self.auc.high,
            "accuracy": self.accuracy.value,
            "slides": float(len(self.slides)),
            "patients": float(len({slide.patient_id for slide, _ in self.slides})),
        }
        if len(self.tasks) > 1:
            values |= {f"auc_{result.task.name}": result.auc.value for result in self.tasks}
            values |= {f"accuracy_{result.task.name}": result.accuracy.value for result in self.tasks}
        return {f"{self.split}_{name}": value for name, value in values.items()}


def evaluate(model: IPSModel, config: Config, slides: Slides) -> Evaluation:
    """Predict committed slides of the split `config.evaluate.split` and measure.

    Intervals are 95% percentile bootstraps over patients, seeded with `config.seed`; the mean over several tasks
    is resampled jointly.

    Raises:
        StageError: no slides, or a task with labels of one class only.
    """
    split = config.evaluate.split
    if not slides:
        raise StageError(f"evaluate: no slide of split {split!r} is committed; tile the cohort or set evaluate.split")
    truth = [_labels(task, slides) for task in config.tasks]
    for task, labels in zip(config.tasks, truth, strict=True):
        check_labels(task.name, split, labels[labels >= 0], task.classes)
    found = _predict(model, config, slides)
    scores = [np.stack([one.probabilities[task.name] for one in found]) for task in config.tasks]

    def statistic(chosen: Ints) -> Floats:
        pairs = [_measure(p[chosen], y[chosen]) for p, y in zip(scores, truth, strict=True)]
        return np.concatenate([np.mean(pairs, axis=0), np.ravel(pairs)])  # (2 + 2T,): means, then each task

    values = statistic(np.arange(len(slides)))
    patients = [slide.patient_id for slide, _ in slides]
    drawn = bootstrap(statistic, patients, config.evaluate.bootstrap, config.seed)
    bounds = [interval(float(value), column) for value, column in zip(values, drawn.T, strict=True)]
    results = [
        _result(task, p, y, bounds[2 + 2 * i], bounds[3 + 2 * i])
        for i, (task, p, y) in enumerate(zip(config.tasks, scores, truth, strict=True))
    ]
    table = _table(slides, config.tasks, scores, truth)
    return Evaluation(split, tuple(slides), found, tuple(results), bounds[0], bounds[1], table)


def _predict(model: IPSModel, config: Config, slides: Slides) -> tuple[BagPrediction, ...]:
    scorer, found = Scorer(model), []
    for number, (_, stored) in enumerate(slides, start=1):
        bag = PatchBag([stored], threads=torch.get_num_threads(), augment=None)
        found.append(predict_bag(model, bag, config.model.select, scorer))
        if number % max(1, len(slides) // 5) == 0:
            log.info("evaluate: %d/%d slides", number, len(slides))
    return tuple(found)


def _labels(task: TaskConfig, slides: Slides) -> Ints:
    """(n,) class index of each slide, -1 where its label is missing."""
    values = [slide.labels.get(task.name) for slide, _ in slides]
    return np.array([-1 if value is None else task.classes.index(str(value)) for value in values], np.int64)


def _measure(probabilities: Floats, labels: Ints) -> tuple[float, float]:
    """AUC and accuracy over the labelled slides; NaN where there is none."""
    known = labels >= 0
    if not known.any():
        return float("nan"), float("nan")
    return task_auc(probabilities[known], labels[known]), accuracy(probabilities[known], labels[known])


def _result(task: TaskConfig, probabilities: Floats, labels: Ints, auc: Interval, share: Interval) -> TaskResult:
    known = np.flatnonzero(labels >= 0)
    p, y = probabilities[known], labels[known]
    shown = task.classes[1:] if task.kind == "binary" else task.classes
    curves = {
        label: roc_points(p[:, k], y == k)
        for k, label in enumerate(task.classes)
        if label in shown and 0 < (y == k).sum() < len(y)
    }
    return TaskResult(task, known, y, p, auc, share, confusion(p, y), curves)


def _table(slides: Slides, tasks: Sequence[TaskConfig], scores: Sequence[Floats], truth: Sequence[Ints]) -> pa.Table:
    columns: dict[str, object] = {
        "slide_id": [slide.slide_id for slide, _ in slides],
        "uri": [slide.uri for slide, _ in slides],
        "patient_id": [slide.patient_id for slide, _ in slides],
        "n_patches": [stored.n_patches for _, stored in slides],
    }
    for task, p, y in zip(tasks, scores, truth, strict=True):
        columns[f"{task.name}_label"] = pa.array([task.classes[k] if k >= 0 else None for k in y], pa.string())
        columns[f"{task.name}_predicted"] = [task.classes[k] for k in p.argmax(axis=1)]
        columns |= {f"{task.name}_{label}": p[:, k] for k, label in enumerate(task.classes)}
    return pa.table(columns)
