"""All that is measured of a task's predictions, by name: `metrics.MEASURES` and what people ask for beside them.

By scikit-learn, which MLflow brings along anyway: it works on whole arrays in float64, takes ties and rare classes as
papers do, and needs no torch. torchmetrics, made to sum over batches on a GPU, rounds to float32 and bins what it
curves; scikit-survival is pinned to other versions of NumPy, and one measure of it is wanted, which stands below.
"""

from __future__ import annotations

import warnings

import numpy as np

from pipeline.config.data import TaskConfig
from pipeline.inference.metrics import MEASURES, Bools, Floats, auc, held, labelled, measure, told_apart
from pipeline.inference.operating import Reliability, decide, reliability

NAMES = {
    "auc": "AUC",
    "accuracy": "Accuracy",
    "exact_match": "All labels right",
    "r2": "R\N{SUPERSCRIPT TWO}",
    "mae": "Mean absolute error",
    "c_index": "Concordance",
    "average_precision": "Average precision",
    "balanced_accuracy": "Balanced accuracy",
    "f1": "F1",
    "kappa": "Cohen's kappa",
    "kappa_quadratic": "Kappa, quadratic (for ordered classes)",
    "log_loss": "Log loss",
    "brier": "Brier score",
    "calibration_error": "Calibration error",
    "threshold": "Threshold, of the validation",
    "sensitivity": "Sensitivity there",
    "specificity": "Specificity there",
    "spearman": "Spearman's correlation",
}
"""Measure -> what people call it."""


def title(name: str) -> str:
    """What people call a measure, also one of a class (`auc_of_x`) or a time (`auc_at_6`)."""
    for joint, spoken in (("_of_", ", "), ("_at_", " at ")):
        head, found, rest = name.partition(joint)
        if found:
            return f"{NAMES[head]}{spoken}{rest}"
    return NAMES[name]


def scores(task: TaskConfig, values: Floats, truth: Floats, threshold: float | None = None) -> dict[str, float]:
    """Measure -> value, over the slides that have a label; what they cannot give is left out.

    Args:
        task: what was predicted.
        values: (n, K), one number for each of `task.outputs`.
        truth: as of `metrics.measure`.
        threshold: of a binary task, from which positive is called: sensitivity and specificity are given of it.
    """
    known = labelled(truth)
    p, y = values[known], truth[known]
    if not len(y):
        return {}
    found = dict(zip(MEASURES[task.kind], measure(task, p, y), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that no slide has, which are told by what is left out
        if task.kind in ("binary", "multiclass"):
            found |= _of_classes(task, p, y, threshold)
        elif task.kind == "multilabel":
            found |= _of_labels(task, p, y)
        elif task.kind == "regression":
            found |= _of_numbers(p[:, 0], y)
        else:
            found |= _of_times(task, p, y)
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def _of_classes(task: TaskConfig, p: Floats, y: Floats, threshold: float | None) -> dict[str, float]:
    from sklearn import metrics  # loads for a second

    labels, called, classes = y.astype(np.int64), p.argmax(axis=1), range(len(task.classes))
    there = [k for k in told_apart(task) if 0 < (labels == k).sum() < len(labels)]
    average = "binary" if task.kind == "binary" else "macro"
    clipped = np.clip(p, 1e-15, 1.0)
    found = {
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, called),
        "f1": metrics.f1_score(labels, called, average=average, zero_division=0),
        "kappa": metrics.cohen_kappa_score(labels, called, labels=list(classes)),
        "log_loss": metrics.log_loss(labels, clipped / clipped.sum(axis=1, keepdims=True), labels=list(classes)),
        "brier": np.square(p - np.eye(len(task.classes))[labels]).sum(axis=1).mean() / (2 if len(p[0]) == 2 else 1),
        "calibration_error": _calibration_error(task, p, y),
    }
    if there:
        areas = [metrics.average_precision_score(labels == k, p[:, k]) for k in there]
        found["average_precision"] = np.mean(areas)
    if task.kind == "multiclass":
        found["kappa_quadratic"] = metrics.cohen_kappa_score(labels, called, labels=list(classes), weights="quadratic")
        found |= {f"auc_of_{task.classes[k]}": auc(p[:, k], labels == k) for k in there}
        found |= {
            f"average_precision_of_{task.classes[k]}": area
            for k, area in zip(there, areas if there else [], strict=True)
        }
    if threshold is not None and task.kind == "binary":
        decision = decide(p[:, 1], labels == 1, threshold)
        found |= {"threshold": threshold, "sensitivity": decision.sensitivity.value}
        found["specificity"] = decision.specificity.value
    return found


def _of_labels(task: TaskConfig, p: Floats, y: Floats) -> dict[str, float]:
    from sklearn import metrics

    own = held(task, y)
    there = [k for k in range(p.shape[1]) if 0 < own[:, k].sum() < len(own)]
    found = {
        "f1": metrics.f1_score(own, p >= 0.5, average="macro", zero_division=0),
        "brier": np.square(p - own).mean(),
        "calibration_error": _calibration_error(task, p, y),
    }
    if there:
        found["average_precision"] = np.mean([metrics.average_precision_score(own[:, k], p[:, k]) for k in there])
    return found | {f"auc_of_{task.classes[k]}": auc(p[:, k], own[:, k]) for k in there}


def calibrations(task: TaskConfig, values: Floats, truth: Floats) -> dict[str, Reliability]:
    """Class or label -> what was predicted and what came true; of a binary task, of the positive class.

    Arguments as of `scores`; empty of tasks without probabilities, and where no slide has a label.
    """
    known = labelled(truth)
    if task.kind in ("regression", "survival") or not known.any():
        return {}
    p, own = values[known], held(task, truth[known])
    return {task.classes[k]: reliability(p[:, k], own[:, k]) for k in told_apart(task)}


def _calibration_error(task: TaskConfig, p: Floats, y: Floats) -> float:
    return float(np.mean([found.error for found in calibrations(task, p, y).values()]))


def _of_numbers(p: Floats, y: Floats) -> dict[str, float]:
    from scipy.stats import spearmanr

    return {"spearman": spearmanr(p, y).statistic} if len(y) > 1 else {}


def _of_times(task: TaskConfig, p: Floats, y: Floats) -> dict[str, float]:
    event = y[:, 1] == 1
    return {f"auc_at_{end:g}": dynamic_auc(1 - p[:, k], y[:, 0], event, end) for k, end in enumerate(task.bins)}


def dynamic_auc(risk: Floats, time: Floats, event: Bools, horizon: float) -> float:
    """Cumulative/dynamic AUC at a time (Uno et al. 2007): who had the event by then against who was then without it.

    Events are weighted by the inverse probability of not being censored before (Kaplan-Meier); whoever was censored by
    then is neither. NaN without one of the two.
    """
    cases, controls = (time <= horizon) & event, time > horizon
    if not cases.any() or not controls.any():
        return float("nan")
    weights = 1 / _uncensored(time, event, time[cases])
    order = np.sign(risk[cases][:, None] - risk[controls][None, :])
    won = (0.5 + order / 2).mean(axis=1)
    return float((weights * won).sum() / weights.sum())


def _uncensored(time: Floats, event: Bools, at: Floats) -> Floats:
    """Kaplan-Meier's probability of not being censored before each of the times `at`."""
    kept, left = 1.0, []
    steps = np.unique(time[~event])
    for step in steps:
        kept *= 1 - (~event[time == step]).sum() / ((time > step).sum() + (~event[time == step]).sum())
        left.append(kept)
    places = np.searchsorted(steps, at, side="left")
    return np.concatenate([[1.0], left])[places]


def as_wrong(task: TaskConfig, truth: Floats) -> Floats | None:
    """Values (n, K) that are as wrong as can be, for slides without a prediction; None where wrong has no end."""
    if task.kind in ("regression", "survival"):
        return None
    return np.where(held(task, truth), -1.0, 2.0)


def with_failures(task: TaskConfig, values: Floats, truth: Floats) -> dict[str, float]:
    """The task's `MEASURES` if all slides without a prediction (NaN) had been predicted as wrong as can be."""
    failed = ~labelled(values)
    worst = as_wrong(task, truth)
    if worst is None:
        return {}
    filled = np.where(failed[:, np.newaxis], worst, values)
    return dict(zip(MEASURES[task.kind], measure(task, filled, truth), strict=True))
