"""95% intervals of metrics, which respect patients and know how few there are.

| measure | each patient has one slide | else |
|---|---|---|
| share of slides that are right | Clopper and Pearson (1934), exact | bootstrap, with the floor below |
| AUC, concordance, means over tasks | bootstrap, with the floor below | the same |
| R2, mean absolute error | bootstrap | the same |

The bootstrap draws patients, as a plan of `resampling` says, and takes percentiles. Of a perfect result every resample
is perfect, so its interval has no width, and near one too little: of 5 positive and 25 negative patients and a true AUC
of .95 it holds the truth in 23 to 75 of 100 samples, where it should in 95. What n independent trials, all of them
right, do not exclude is a share of (alpha / 2)^(1 / n), the lower end of Clopper and Pearson. A worse result of as many
trials cannot exclude it either, so no lower end lies above it, and, from the other side, no upper end below 1 minus it.
Trials are patients for shares and, for AUC and concordance, pairs of patients of whom each is in one pair: all of them
stand in order in at most value^n of samples, whatever the scores' distributions, and in that many where some of a class
look like the other one. Intervals of Hanley and McNeil (1982) and Newcombe (2006) suppose scores of one shape; there
they hold the truth in 67 to 97 of 100. A mean of several, as over classes, has the mean of their floors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

from pipeline.config.data import TaskConfig
from pipeline.inference.metrics import MEASURES, Bools, Floats, held, labelled, told_apart

SHARES = ("accuracy", "exact_match")
_ALPHA = 0.05


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its 95% interval."""

    value: float
    low: float
    high: float


def task_intervals(
    task: TaskConfig, truth: Floats, patients: Sequence[str], measures: Sequence[float], resampled: Floats
) -> list[Interval]:
    """Of each of a task's `MEASURES`.

    Args:
        task: what was predicted.
        truth: (n,) or (n, W) of all slides (`labels.truth`); NaN where missing.
        patients: n ids.
        measures: their values.
        resampled: (R, measures), as of `weighted.resampled_measures`.
    """
    _, owners = _labelled(truth, patients)
    found = []
    for name, value, column in zip(MEASURES[task.kind], measures, resampled.T, strict=True):
        if np.isnan(value):
            found.append(interval(value, column))
        elif name in SHARES and len(set(owners)) == len(owners):
            found.append(Interval(value, *clopper_pearson(round(value * len(owners)), len(owners))))
        else:
            found.append(interval(value, column, floor(task, name, truth, patients)))
    return found


def floor(task: TaskConfig, name: str, truth: Floats, patients: Sequence[str]) -> float | None:
    """What a perfect result of as many patients would not exclude; None of a measure that counts no trials.

    Arguments as of `task_intervals`; `name` is one of the task's `MEASURES`.
    """
    found = trials(task, name, truth, patients)
    return float(np.mean([least(n) for n in found])) if found else None


def trials(task: TaskConfig, name: str, truth: Floats, patients: Sequence[str]) -> list[int]:
    """How many independent trials a measure counts, of each class where it is their mean; none of one that counts none.

    Arguments as of `floor`.
    """
    y, owners = _labelled(truth, patients)
    if name in SHARES:
        return [len(set(owners))]
    if name == "c_index":
        return [comparable_pairs(y[:, 0], y[:, 1] == 1, owners)]
    if name == "auc":
        own = held(task, y)
        return [opposed_pairs(own[:, k], owners) for k in told_apart(task) if 0 < own[:, k].sum() < len(own)]
    return []


def _labelled(truth: Floats, patients: Sequence[str]) -> tuple[Floats, list[str]]:
    """Truth and patient of the slides that have a label."""
    known = np.flatnonzero(labelled(truth)).tolist()
    return truth[known], [patients[place] for place in known]


def least(n: int) -> float:
    """The lower end for n independent trials that are all right."""
    return float((_ALPHA / 2) ** (1 / n))


def clopper_pearson(right: int, n: int) -> tuple[float, float]:
    """Ends of the exact interval of a share, of which `right` of n independent trials were right."""
    low = beta.ppf(_ALPHA / 2, right, n - right + 1) if right else 0.0
    high = beta.ppf(1 - _ALPHA / 2, right + 1, n - right) if right < n else 1.0
    return float(low), float(high)


def opposed_pairs(positive: Bools, owners: Sequence[str]) -> int:
    """Most pairs of a patient with a positive slide and another with a negative one, each patient in one pair."""
    ids = np.asarray(owners, dtype=np.str_)
    with_positive, with_negative = set(ids[positive]), set(ids[~positive])
    whole = len(with_positive | with_negative)
    return max(1, min(len(with_positive), len(with_negative), whole // 2))  # 1: slides of one patient alone


def comparable_pairs(time: Floats, event: Bools, owners: Sequence[str]) -> int:
    """Most pairs of patients of whom the first had the event before the other's time, each patient in one pair."""
    _, first = np.unique(np.asarray(owners, dtype=np.str_), return_index=True)  # a patient's slides have one time
    order = np.argsort(time[first], kind="stable")
    time, event = time[first][order], event[first][order]
    for pairs in range(min(int(event.sum()), len(time) // 2), 1, -1):
        early = np.flatnonzero(event)[:pairs]  # no other choice fits more: the earliest events, the latest of the rest
        late = np.delete(time, early)[-pairs:]
        if (time[early] < late).all():
            return pairs
    return 1


def interval(value: float, resampled: Floats, least_low: float | None = None) -> Interval:
    """The 2.5 and 97.5 percentiles of resampled values (R,) around the value of the whole sample.

    Resamples that lack what the measure needs (NaN) are left out; where hardly any has it, there are no bounds (NaN).
    `least_low` is the `floor` above which no lower end lies, and below 1 minus which no upper end.
    """
    there = resampled[~np.isnan(resampled)]
    if np.isnan(value) or 2 * len(there) < len(resampled):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(there, (_ALPHA / 2, 1 - _ALPHA / 2))
    if least_low is not None:
        low, high = min(low, least_low), max(high, 1 - least_low)
    return Interval(value, float(low), float(high))
