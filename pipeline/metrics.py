"""Metrics from probabilities, with intervals that respect patients. n slides, K classes; plain numpy.

A slide's true class is an index into the task's classes; slides without a label are left out by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import StageError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its 95% interval."""

    value: float
    low: float
    high: float


def auc(scores: Floats, positive: Bools) -> float:
    """Area under the ROC curve (n,), (n,): the share of (positive, negative) pairs in order, ties count half.

    Mann-Whitney's U over the number of pairs; NaN where one of the two is absent.
    """
    count = int(positive.sum())
    pairs = count * (len(positive) - count)
    if pairs == 0:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mid-ranks from 1
    return float((ranks[positive].sum() - count * (count + 1) / 2) / pairs)


def task_auc(probabilities: Floats, labels: Ints) -> float:
    """AUC of a task (n, K), (n,): of the second class when K = 2, else the mean of one class against the rest.

    Classes that no slide has, or all slides have, are left out of that mean; NaN when none is left.
    """
    classes = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    areas = np.array([auc(probabilities[:, k], labels == k) for k in classes])
    defined = areas[~np.isnan(areas)]
    return float(defined.mean()) if len(defined) else float("nan")


def roc_points(scores: Floats, positive: Bools) -> tuple[Floats, Floats]:
    """False and true positive rate at every threshold, from (0, 0) to (1, 1); slides of one score move together."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(positive[order])[last]
    alarms = last + 1 - hits
    return np.append(0.0, alarms / max(1, alarms[-1])), np.append(0.0, hits / max(1, hits[-1]))


def accuracy(probabilities: Floats, labels: Ints) -> float:
    """Share of slides whose most probable class is the true one; ties go to the first class."""
    return float((probabilities.argmax(axis=1) == labels).mean())


def confusion(probabilities: Floats, labels: Ints) -> Ints:
    """Counts (K, K): row = true class, column = most probable class."""
    classes = probabilities.shape[1]
    cells = labels * classes + probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes).astype(np.int64)


def bootstrap(statistic: Callable[[Ints], Floats], patients: Sequence[str], resamples: int, seed: int) -> Floats:
    """Values (resamples, S) of a statistic over slides drawn by patient, with replacement.

    A patient's slides stand or fall together, as they are not independent. `statistic` maps slide indices to S
    numbers; a resample where one of them is NaN (a class is absent) is drawn again, so the values are
    conditional on every class being there.
    """
    names, owner = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)
    slides = [np.flatnonzero(owner == patient) for patient in range(len(names))]
    generator = np.random.default_rng(seed)
    values: list[Floats] = []
    while len(values) < resamples:
        drawn = generator.integers(len(names), size=len(names))
        value = statistic(np.concatenate([slides[patient] for patient in drawn]))
        if not np.isnan(value).any():
            values.append(value)
    return np.stack(values)


def interval(value: float, resampled: Floats) -> Interval:
    """The 2.5 and 97.5 percentiles of resampled values (R,) around the value of the whole sample."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(value, float(low), float(high))


def check_labels(task: str, split: str, labels: Ints, classes: Sequence[str]) -> None:
    """StageError unless at least two classes are there: with one, no AUC exists."""
    found = [classes[k] for k in np.unique(labels)]
    if len(found) < 2:
        raise StageError(
            f"evaluate: split {split!r} has {len(labels)} slides labelled for task {task!r}, of classes {found}; "
            f"an AUC needs two of {list(classes)}: give the split slides of both, or choose evaluate.split"
        )
