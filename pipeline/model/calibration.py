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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from pipeline.config.data import TaskConfig
from pipeline.errors import StageError

CALIBRATION = "calibration.json"
"""Beside a registered model: outputs and labels of slides that it was tested on; no names, but digests."""
KINDS = {"regression": "95%", "binary": "calibrated", "multiclass": "calibrated", "multilabel": "calibrated"}
"""Kind of a task -> what its intervals are called; none of survival."""

_VERSION = 1
_MOST = 10_000  # cases of a task: 0.3 MB an output, and 1 ms for each place of an output
_ERROR = 0.05  # of 100 new values, so many may lie outside

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cases:
    """Of one task: n labelled slides, each of another patient, in an order that says nothing of them."""

    said: Floats
    """(n, K) the outputs."""
    came: Floats
    """(n, K) 1 where the slide has the class or label, else 0; of a regression the label's value."""
    names: tuple[tuple[str, ...], ...] = ()
    """(n,) digests by which a slide that is one of them is known, as `Seen` has them; none: nobody noted them."""

    @cached_property
    def steps(self) -> tuple[Steps, ...]:
        """(K,) of probabilities."""
        return tuple(Steps(said, came) for said, came in zip(self.said.T, self.came.T, strict=True))

    @cached_property
    def _named(self) -> dict[str, int]:
        return {digest: place for place, names in enumerate(self.names) for digest in names}

    def without(self, digests: Collection[str]) -> Cases:
        """All but those that are known by one of these: a slide's own label must not tell of it."""
        own = {self._named[digest] for digest in digests if digest in self._named}
        if not own:
            return self
        left = [place for place in range(len(self.said)) if place not in own]
        return Cases(self.said[left], self.came[left], tuple(self.names[place] for place in left))


class Steps:
    """What outputs of one class or label mean, as `venn_abers`.

    It follows from an output's place among the n known ones alone, so each of 2n + 1 places is looked at once at most.
    """

    def __init__(self, said: Floats, came: Floats) -> None:
        """(n,) outputs, and (n,) truths, 0 or 1."""
        self._known, places = np.unique(said, return_inverse=True)
        self._many = np.bincount(places, minlength=len(self._known)).astype(np.float64)
        self._had = np.bincount(places, came, minlength=len(self._known))
        self._found: dict[tuple[int, int], tuple[float, float]] = {}

    def at(self, value: float) -> tuple[float, float]:
        """The ends, low and high, of an output."""
        first, last = (int(np.searchsorted(self._known, value, side)) for side in ("left", "right"))
        if (first, last) not in self._found:
            many, had = (
                column.copy() if first < last else np.insert(column, first, 0.0) for column in (self._many, self._had)
            )
            many[first] += 1
            low = float(isotonic_regression(had / many, weights=many).x[first])
            had[first] += 1
            self._found[first, last] = low, float(isotonic_regression(had / many, weights=many).x[first])
        return self._found[first, last]


def chosen(slide_ids: Sequence[str], patients: Sequence[str]) -> list[int]:
    """Places of the slides that are cases: of each patient the one whose id has the least sha256, in that order."""
    order = sorted(range(len(slide_ids)), key=lambda place: hashlib.sha256(slide_ids[place].encode()).digest())
    first: dict[str, int] = {}
    for place in order:
        first.setdefault(patients[place], place)
    return list(first.values())[:_MOST]


def calibration_json(cases: Mapping[str, Cases], split: str = "test") -> dict[str, Any]:
    """What `CALIBRATION` holds of tasks that have cases, by the slides of a split."""
    tasks = {
        name: {"patients": len(own.said), "said": own.said.tolist(), "came": own.came.tolist(), "names": own.names}
        for name, own in cases.items()
        if len(own.said)
    }
    return {"version": _VERSION, "split": split, "tasks": tasks}


def read_calibration(folder: Path, tasks: Sequence[TaskConfig]) -> dict[str, Cases]:
    """What stands beside a model of these tasks; nothing beside one of earlier releases, or an ensemble.

    Raises:
        StageError: it is damaged, of other tasks, or of a newer release.
    """
    path = folder / CALIBRATION
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        if found["version"] != _VERSION:
            raise StageError(f"{path}: is of version {found['version']}, and this release knows {_VERSION}; update it")
        widths = {task.name: len(task.output_columns) for task in tasks}
        return {name: _cases(name, own, widths[name]) for name, own in found["tasks"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(f"{path}: cannot be read ({error}); restore it, or remove it for no intervals") from error


def _cases(name: str, own: Mapping[str, Any], width: int) -> Cases:
    """Of a task of so many outputs; ValueError where they are not."""
    said, came = (
        np.array(own[column], np.float64).reshape(len(own[column]), -1 if own[column] else width)
        for column in ("said", "came")
    )
    names = tuple(map(tuple, own["names"]))
    if not len(said) == len(came) == own["patients"] or len(names) not in (0, len(said)):
        raise ValueError(f"{name}: {own['patients']} patients, {len(said)} said, {len(came)} came, {len(names)} names")
    if not said.shape[1] == came.shape[1] == width:
        raise ValueError(f"{name}: {said.shape[1]} outputs and {came.shape[1]} truths, the model has {width}")
    if not (np.isfinite(said).all() and np.isfinite(came).all()):
        raise ValueError(f"{name}: values that are no finite numbers")
    return Cases(said, came, names)


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
    tasks: Sequence[TaskConfig],
    cases: Mapping[str, Cases],
    values: Mapping[str, float],
    digests: Collection[str] = (),
) -> dict[str, tuple[float, float]]:
    """Output column -> the ends of its interval, of those that have one.

    Args:
        tasks: of the model.
        cases: task -> what is known of it.
        values: output column -> what the model says.
        digests: by which the slide is known, where it is a case itself (`Cases.names`).
    """
    found, named = dict[str, tuple[float, float]](), end_columns(tasks)
    for task in (task for task in tasks if task.name in cases):
        own, columns = cases[task.name].without(digests), task.output_columns
        if task.kind == "regression":
            if (reach := conformal_reach(np.abs(own.said - own.came)[:, 0])) is not None:
                found |= {column: (values[column] - reach, values[column] + reach) for column in columns}
        elif task.kind == "binary":  # one output is what the other leaves of 1
            low, high = own.steps[1].at(values[columns[1]])
            found |= {columns[0]: (1 - high, 1 - low), columns[1]: (low, high)}
        else:
            found |= {column: steps.at(values[column]) for column, steps in zip(columns, own.steps, strict=True)}
    return {column: ends for column, ends in found.items() if column in named}


def venn_abers(said: Floats, came: Floats, value: float) -> tuple[float, float]:
    """What an output `value` means, by cases of which (n,) outputs and (n,) truths (0 or 1) are known: low, high."""
    return Steps(said, came).at(value)


def conformal_reach(errors: Floats) -> float | None:
    """How far from an output its label is, at most; None where (n,) known errors are too few to tell."""
    rank = math.ceil(round((len(errors) + 1) * (1 - _ERROR), 9))
    return float(np.sort(errors)[rank - 1]) if rank <= len(errors) else None
