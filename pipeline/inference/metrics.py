"""Metrics from predictions. n slides, K outputs of a task; plain numpy.

A slide's true class is an index into the task's classes. `measure` leaves slides without a label out; the functions
below it take labelled ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.config.data import TaskConfig

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MEASURES: Mapping[str, tuple[str, ...]] = {
    "binary": ("auc", "accuracy"),
    "multiclass": ("auc", "accuracy"),
    "multilabel": ("auc", "exact_match"),
    "regression": ("r2", "mae"),
    "survival": ("c_index",),
}
"""Kind of a task -> what is measured; the first one is what models are compared by. Higher is better, but for `mae`,
which is in the unit of the task's column."""


def measure(task: TaskConfig, values: Floats, truth: Floats) -> tuple[float, ...]:
    """The `MEASURES` of a task over the slides that have a label; NaN where their labels cannot give one.

    Args:
        task: what was predicted.
        values: (n, K), one number for each of `task.outputs`.
        truth: (n,), or (n, K) for multilabel and (n, 2) for survival (`labels.truth`); NaN where missing.
    """
    known = labelled(truth)
    p, y = values[known], truth[known]
    if not len(y):
        return (float("nan"),) * len(MEASURES[task.kind])
    if task.kind == "multilabel":
        return label_auc(p, y == 1), float(((p >= 0.5) == (y == 1)).all(axis=1).mean())
    if task.kind == "regression":
        return r_squared(p[:, 0], y), float(np.abs(p[:, 0] - y).mean())
    if task.kind == "survival":
        return (concordance(expected_time(p, task.bins), y[:, 0], y[:, 1] == 1),)
    labels = y.astype(np.int64)
    return task_auc(p, labels), accuracy(p, labels)


def labelled(truth: Floats) -> Bools:
    """(n,) which slides have a label, of truth (n,) or (n, W)."""
    missing = np.isnan(truth)
    known: Bools = np.logical_not(missing if truth.ndim == 1 else missing.any(axis=1))
    return known


def held(task: TaskConfig, truth: Floats) -> Bools:
    """(n, K) which slides hold which class or label, of labelled ones: truth as of `measure`."""
    found: Bools = truth == 1 if task.kind == "multilabel" else truth[:, None] == np.arange(len(task.classes))
    return found


def told_apart(task: TaskConfig) -> range:
    """The classes or labels that are measured against the rest; of a binary task the positive one alone."""
    return range(1, 2) if task.kind == "binary" else range(len(task.classes))


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


def label_auc(probabilities: Floats, held: Bools) -> float:
    """Mean AUC of the labels (n, K), (n, K); those that all slides have, or none has, are left out; NaN for none."""
    areas = np.array([auc(probabilities[:, k], held[:, k]) for k in range(held.shape[1])])
    defined = areas[~np.isnan(areas)]
    return float(defined.mean()) if len(defined) else float("nan")


def r_squared(predicted: Floats, true: Floats) -> float:
    """1 - residual / total sum of squares, (n,), (n,); NaN where all true values are one."""
    if true.min() == true.max():  # the mean of equal values may differ from them in the last bit
        return float("nan")
    return 1 - float(np.square(true - predicted).sum()) / float(np.square(true - true.mean()).sum())


def expected_time(survival: Floats, bins: Sequence[float]) -> Floats:
    """Time survived until the last bin's end (n,), of survival probabilities (n, K) at the bins' ends (K,).

    The area under the survival curve, straight between the ends (restricted mean survival time).
    """
    before = np.concatenate([np.ones((len(survival), 1)), survival[:, :-1]], axis=1)
    area: Floats = (before + survival) / 2 @ np.diff([0.0, *bins])
    return area


def concordance(predicted: Floats, time: Floats, event: Bools) -> float:
    """Harrell's concordance index (1982) of predicted times (n,): the share of comparable pairs in the right order.

    A pair is comparable where the shorter time ended in the event; equal predictions count half; NaN without pairs.
    """
    comparable = (time[:, None] < time[None, :]) & event[:, None]
    if not comparable.any():
        return float("nan")
    order = np.sign(predicted[None, :] - predicted[:, None])
    return float((0.5 + order[comparable] / 2).mean())


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


def confusion(called: Ints, labels: Ints, classes: int) -> Ints:
    """Counts (K, K) of n slides: row = true class, column = the one that it is called."""
    cells = labels * classes + called
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes).astype(np.int64)
