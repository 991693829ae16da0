"""The test: predict every slide of a split, then metrics with intervals that respect patients."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ips.network.model import IPSModel
from pipeline.bags.sources import LabelledSource, open_bag
from pipeline.cohort.labels import NONE, Label, lacks, stratum, truth
from pipeline.config.data import TaskConfig
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.inference.intervals import Interval, floor, interval
from pipeline.inference.measured import Measured, measured
from pipeline.inference.metrics import MEASURES, Floats, Ints, confusion, expected_time, held, roc_points, told_apart
from pipeline.inference.prediction import BagPrediction, bag_scorer, predict_bag
from pipeline.inference.resampling import draw_plan
from pipeline.model.calibration import CALIBRATION, KINDS, Cases, calibration_json, chosen
from pipeline.model.folder import Seen
from pipeline.results.strata import Stratum, strata
from pipeline.storage.files import join, write_json

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
    scores: Mapping[str, float]
    """All that is measured, as of `measured.Measured`."""
    confusion: Ints | None
    """(K, K): row = true class, column = most probable class; binary and multiclass only."""
    threshold: float | None
    """Of a binary task: chosen on the validation slides; None where none was."""
    confusion_there: Ints | None
    """As `confusion`, positive called from the threshold on."""
    strata: tuple[Stratum, ...]
    roc: Mapping[str, tuple[Floats, Floats]]
    """Class or label -> false and true positive rates, against the rest; binary: of the positive class."""

    def cases(self, evaluated: Slides, without: Collection[str] = ()) -> Cases:
        """What `evaluated`, which `slides` are places of, tell of others, but for slides `without` by their ids."""
        left = [at for at, place in enumerate(self.slides) if evaluated[place][0].slide_id not in without]
        known = [evaluated[self.slides[at]][0] for at in left]
        picked = chosen([slide.slide_id for slide in known], [slide.patient_id for slide in known])
        there = [left[at] for at in picked]
        came = self.truth[:, None] if self.task.kind == "regression" else held(self.task, self.truth)
        names = tuple((Seen.patient(known[at].patient_id), evaluated[self.slides[left[at]]][1].key) for at in picked)
        return Cases(self.values[there], came[there].astype(np.float64), names)


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
        """Flat metrics, prefixed with the split: test_auc, test_auc_low, test_auc_high, test_accuracy, test_f1, ...

        The ends are of each measure over all tasks; those of one task of several stand in its `measures`. Of several
        tasks, all that is measured of one has its name: test_auc_<task>, test_f1_<task>, ...
        """
        values: dict[str, float] = {}
        for result in self.tasks:
            end = f"_{result.task.name}" if len(self.tasks) > 1 else ""
            values |= {f"{name}{end}": value for name, value in result.scores.items()}
        values |= {name: found.value for name, found in self.measures.items()}
        for name, found in self.measures.items():
            ends = {f"{name}_low": found.low, f"{name}_high": found.high}
            values |= {key: end for key, end in ends.items() if not np.isnan(end)}
        values |= {
            "slides": float(len(self.slides)),
            "patients": float(len({slide.patient_id for slide, _ in self.slides})),
        }
        return {f"{self.split}_{name}": value for name, value in values.items()}

    def calibration(self, without: Collection[str] = ()) -> dict[str, Any]:
        """What is kept beside the model, for intervals of its predictions, but for slides `without` by their ids."""
        own = [result for result in self.tasks if result.task.kind in KINDS]
        return calibration_json({result.task.name: result.cases(self.slides, without) for result in own}, self.split)


def write_cases(evaluation: Evaluation, folder: str, without: Collection[str] = ()) -> dict[str, str]:
    """Write what intervals follow from, where it was the test: name of the output -> its place.

    Args:
        evaluation: of any split.
        folder: URI; nothing is written there where it was another split.
        without: ids of slides that the model has learned from.
    """
    if evaluation.split != "test":
        log.warning(
            "evaluate: predictions of this model will have no intervals: they follow from slides that it neither "
            "learned from nor was chosen by, and evaluate.split is %s, not test",
            evaluation.split,
        )
        return {}
    place = join(folder, CALIBRATION)
    write_json(place, evaluation.calibration(without))
    return {"calibration": place}


def evaluate(
    model: IPSModel, config: Config, slides: Slides, thresholds: Mapping[str, float] | None = None
) -> Evaluation:
    """Predict committed slides of the split `config.evaluate.split` and measure.

    Intervals are over `config.evaluate.bootstrap` resamples of the patients, one plan (`resampling`) seeded with
    `config.seed` and stratified by the first task: the means over several tasks are resampled jointly.

    Args:
        model: what predicts.
        config: of the model.
        slides: of the split.
        thresholds: binary task -> the score from which positive is called, chosen on other slides.

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
    patients, first = [slide.patient_id for slide, _ in slides], config.tasks[0]
    levels = [stratum(first, label) for label in labels[first.name]]
    weights = draw_plan(patients, levels, config.evaluate.bootstrap, config.seed).weights(patients)
    parts = []
    for task in config.tasks:
        y = np.array([truth(task, label) for label in labels[task.name]])
        values = np.stack([one.values[task.name] for one in found])
        cut = (thresholds or {}).get(task.name)
        parts.append((task, values, y, measured(task, values, y, patients, weights, cut)))
    return Evaluation(
        split=split,
        slides=tuple(slides),
        found=found,
        tasks=tuple(_result(slides, labels[task.name], task, p, y, own) for task, p, y, own in parts),
        measures=_overall(parts, patients),
        predictions=_table(slides, config.tasks, labels, [p for _, p, _, _ in parts]),
        seconds=seconds,
    )


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


def _overall(
    parts: Sequence[tuple[TaskConfig, Floats, Floats, Measured]], patients: Sequence[str]
) -> dict[str, Interval]:
    """Mean of each measure over the tasks (task, values, truth, measured) that have it; of one task, its own."""
    found: dict[str, Interval] = {}
    for name in dict.fromkeys(name for task, *_ in parts for name in MEASURES[task.kind]):
        those = [(task, y, own) for task, _, y, own in parts if name in own.measures]
        if len(those) == 1:
            if name != "mae" or len(parts) == 1:
                found[name] = those[0][2].measures[name]
        elif name != "mae":
            drawn = np.mean([own.resampled[:, MEASURES[task.kind].index(name)] for task, _, own in those], axis=0)
            floors = [least for task, y, _ in those if (least := floor(task, name, y, patients)) is not None]
            value = float(np.mean([own.measures[name].value for *_, own in those]))
            found[name] = interval(value, drawn, float(np.mean(floors)) if floors else None)
    return found


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
    slides: Slides, labels: Sequence[Label | None], task: TaskConfig, values: Floats, truths: Floats, found: Measured
) -> TaskResult:
    known = np.array([place for place, label in enumerate(labels) if label is not None], np.int64)
    p, y = values[known], truths[known]
    classes, cut = task.kind in ("binary", "multiclass"), found.scores.get("threshold")
    return TaskResult(
        task=task,
        slides=known,
        labels=tuple(label for label in labels if label is not None),
        truth=y,
        values=p,
        predicted=tuple(_predicted(task, p)),
        measures=found.measures,
        scores=found.scores,
        confusion=confusion(p.argmax(axis=1), y.astype(np.int64), len(task.classes)) if classes else None,
        threshold=cut,
        confusion_there=None if cut is None else confusion((p[:, 1] >= cut).astype(np.int64), y.astype(np.int64), 2),
        roc=_curves(task, p, y),
        strata=tuple(strata([slide for slide, _ in slides], task, values, truths)),
    )


def _curves(task: TaskConfig, values: Floats, truths: Floats) -> dict[str, tuple[Floats, Floats]]:
    """ROC of every class or label that some slides have and others do not."""
    if task.kind in ("regression", "survival"):
        return {}
    own = held(task, truths)
    there = [k for k in told_apart(task) if 0 < own[:, k].sum() < len(own)]
    return {task.classes[k]: roc_points(values[:, k], own[:, k]) for k in there}


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
