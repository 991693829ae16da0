"""Whether one model is shown to be no worse than another, on few patients too: the lower bound of their difference.

The most careful of three bounds counts, each one-sided at the level asked for.

- Percentiles of paired resamples of patients, stratified (`inference.resampling`): for every measure.
- DeLong et al. (1988), of the AUC of a binary task, clustered by patient as Obuchowski (1997). Slides of one patient
  are taken for alike, as in the resamples; with fewer than a dozen patients of a class neither knows enough.
- The difference that was found, with the variance that the loss to be excluded has at least. Resamples and DeLong know
  only what the test shows: a model that is as good but for a kind that 2% of patients have shows no loss at all on 25
  patients in 60 of 100 tests. The variance of a proportion is taken at the bound, as Tango (1998) does for paired
  proportions: a loss of m that sits in whole patients has the variance m (1 - m) / n. So n patients on whom nothing
  differs exclude a loss of m where n m / (1 - m) > z^2: at 95%, 133 patients one of .02, 52 one of .05. Of AUC, n is
  the rarer class's, since the loss may sit there.

`tests.bench.gate` measures how often a model that is worse by just the margin is let through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from pipeline.cohort.labels import Label, stratum
from pipeline.config.data import TaskConfig
from pipeline.inference.intervals import trials
from pipeline.inference.metrics import MEASURES, Floats, measure
from pipeline.inference.resampling import delong, draw_plan, paired_difference
from pipeline.inference.weighted import resampled_measures

LESS = frozenset({"mae"})
"""Measures of which less is better."""


@dataclass(frozen=True)
class Bounds:
    """A difference, candidate minus champion, counted so that more is better; and what it is not below."""

    value: float
    shown: float
    """By resamples, and DeLong: what the test shows."""
    low: float
    """Also where the loss sits in few patients: never above `shown`."""
    trials: int
    """Patients, of the rarer class where it is an AUC, that `low` is by; 0 where the measure counts none."""
    needed: int
    """As many would make `low` reach the margin, if the difference stays as it is."""


def bounds(
    task: TaskConfig,
    name: str,
    values: tuple[Floats, Floats],
    truth: Floats,
    labels: Sequence[Label | None],
    patients: Sequence[str],
    *,
    margin: float,
    level: float,
    resamples: int,
    seed: int,
) -> Bounds:
    """Of slides that have a label.

    Args:
        task: what was predicted.
        name: of a measure of the task, which both models have.
        values: (n, K) of the candidate and of the champion.
        truth: (n,) or (n, W).
        labels: n, by which patients are drawn in strata.
        patients: n ids.
        margin: the loss to be excluded.
        level: of the one-sided bounds.
        resamples: how many.
        seed: of what is drawn.

    Raises:
        StageError: hardly any resample has what the measure needs.
    """
    sign, place = -1.0 if name in LESS else 1.0, MEASURES[task.kind].index(name)
    weights = draw_plan(patients, [stratum(task, label) for label in labels], resamples, seed).weights(patients)
    first, second = (sign * measure(task, each, truth)[place] for each in values)
    drawn = tuple(sign * resampled_measures(task, each, truth, weights)[:, place] for each in values)
    found = paired_difference((first, second), (drawn[0], drawn[1]), alpha=2 * (1 - level))
    shown = found.low
    if name == "auc" and task.kind == "binary":
        positives = (values[0][:, 1], values[1][:, 1])
        shown = min(shown, delong(positives, truth == 1, patients, alpha=2 * (1 - level)).low)
    fewest, spread = 0, 0.0
    few = trials(task, name, truth, patients)
    for n in few:
        spread, fewest = max((spread, fewest), (_spread(margin, n, len(few)), n))
    reach = float(norm.ppf(level)) * spread
    needed = math.ceil(fewest * (reach / (found.value + margin)) ** 2) if found.value + margin > 0 else 0
    return Bounds(found.value, shown, min(shown, found.value - reach), fewest, needed)


def _spread(margin: float, n: int, of: int) -> float:
    """Standard error of a measure, the mean of `of` ones, whose loss of the margin sits in one of them, of n trials."""
    whole = min(1.0, margin * of)
    return float(np.sqrt(whole * (1 - whole) / n)) / of
