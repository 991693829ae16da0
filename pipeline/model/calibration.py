"""What an output was worth on slides that the model did not learn from, and the intervals that follow for a new one.

Probabilities: the interval of Venn and Abers (Vovk and Petej, "Venn-Abers predictors", UAI 2014; the inductive form of
Vovk, Petej and Fedorova, "Large-scale probabilistic predictors with and without guarantees of validity", NIPS 2015).
The known cases and the new one, once taken for a slide that has the class and once for one that has not, give two
isotonic regressions of having it on the output; their values at the new one are the ends. One of both, that of the
truth, is calibrated, whatever the model and the distribution: of slides with that end p a share of p has the class. The
other one is off by about one over the number of like cases, so few cases make a wide interval and nothing else must be
assumed. It is of the calibrated probability and not of the output: a model that is too sure lies outside. A set of
classes at a stated level, as conformal prediction gives, would have said less: of a binary task mostly that it is both.

Numbers: split conformal prediction (Papadopoulos et al., "Inductive confidence machines", ECML 2002; Lei et al.,
"Distribution-free predictive inference for regression", JASA 2018). The output, less and more the ceil((n + 1) * 0.95)
smallest of the n known errors, holds the value of a new slide in at least 95 of 100 draws of the cases and the slide;
below 19 cases nothing does. Survival has no interval: what is censored has no error.

Both ask for one thing, that the new slide could as well have been one of the cases. So these are of the evaluated
split, which chose nothing, where the validation slides may have chosen the checkpoint; and of a patient there is one.
Slides of another cohort, scanner or prevalence break it, and nothing here notices.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from pipeline.config.data import TaskConfig
from pipeline.errors import StageError

CALIBRATION = "calibration.json"
"""Beside a registered model: outputs and labels of slides that it was tested on; no name of a slide or patient."""
KINDS = {"regression": "95%", "binary": "calibrated", "multiclass": "calibrated", "multilabel": "calibrated"}
"""Kind of a task -> what its intervals are called; none of survival."""

_VERSION = 1
_MOST = 10_000  # cases of a task: 0.3 MB an output, and 1 ms an interval
_ERROR = 0.05  # of 100 new values, so many may lie outside

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cases:
    """Of one task: n labelled slides, each of another patient, in an order that says nothing of them."""

    said: Floats
    """(n, K) the outputs."""
    came: Floats
    """(n, K) 1 where the slide has the class or label, else 0; of a regression the label's value."""


def chosen(slide_ids: Sequence[str], patients: Sequence[str]) -> list[int]:
    """Places of the slides that are cases: of each patient the one whose id has the least sha256, in that order."""
    order = sorted(range(len(slide_ids)), key=lambda place: hashlib.sha256(slide_ids[place].encode()).digest())
    first: dict[str, int] = {}
    for place in order:
        first.setdefault(patients[place], place)
    return list(first.values())[:_MOST]


def calibration_json(cases: Mapping[str, Cases]) -> dict[str, Any]:
    """What `CALIBRATION` holds of tasks."""
    tasks = {name: {"said": own.said.tolist(), "came": own.came.tolist()} for name, own in cases.items()}
    return {"version": _VERSION, "tasks": tasks}


def read_calibration(folder: Path) -> dict[str, Cases]:
    """What stands beside a model; nothing beside one of earlier releases, or an ensemble.

    Raises:
        StageError: it is damaged, or of a newer release.
    """
    path = folder / CALIBRATION
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        if found["version"] != _VERSION:
            raise StageError(f"{path}: is of version {found['version']}, and this release knows {_VERSION}; update it")
        return {
            name: Cases(np.array(own["said"], np.float64), np.array(own["came"], np.float64))
            for name, own in found["tasks"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(f"{path}: cannot be read ({error}); restore it, or remove it for no intervals") from error


def end_columns(tasks: Sequence[TaskConfig]) -> dict[str, tuple[str, str]]:
    """Output column -> what the ends of its interval are called, of outputs that may have one.

    None where an output is called so itself, as that of a class `a_low` beside a class `a`.
    """
    outputs = {column for task in tasks for column in task.output_columns}
    named = {
        column: (f"{column}_low", f"{column}_high")
        for task in tasks
        if task.kind in KINDS
        for column in task.output_columns
    }
    return {column: ends for column, ends in named.items() if outputs.isdisjoint(ends)}


def intervals(
    tasks: Sequence[TaskConfig], cases: Mapping[str, Cases], values: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """Output column -> the ends of its interval, of those that have one.

    Args:
        tasks: of the model.
        cases: task -> what is known of it.
        values: output column -> what the model says.
    """
    found, named = dict[str, tuple[float, float]](), end_columns(tasks)
    for task in (task for task in tasks if task.name in cases):
        own = cases[task.name]
        for column, said, came in zip(task.output_columns, own.said.T, own.came.T, strict=True):
            if column not in named:
                continue
            if task.kind != "regression":
                found[column] = venn_abers(said, came, values[column])
            elif (reach := conformal_reach(np.abs(said - came))) is not None:
                found[column] = values[column] - reach, values[column] + reach
    return found


def venn_abers(said: Floats, came: Floats, value: float) -> tuple[float, float]:
    """What an output `value` means, by cases of which (n,) outputs and (n,) truths (0 or 1) are known: low, high."""
    _, places = np.unique(np.append(said, value), return_inverse=True)
    many, place = np.bincount(places), places[-1]
    low, high = (
        float(isotonic_regression(np.bincount(places, np.append(came, truth)) / many, weights=many).x[place])
        for truth in (0.0, 1.0)
    )
    return low, high


def conformal_reach(errors: Floats) -> float | None:
    """How far from an output its label is, at most; None where (n,) known errors are too few to tell."""
    rank = math.ceil(round((len(errors) + 1) * (1 - _ERROR), 9))
    return float(np.sort(errors)[rank - 1]) if rank <= len(errors) else None
