"""The measures of `metrics` on many resamples of the slides at once: B resamples, n slides, weights (B, n).

A weight says how often a resample holds a slide, so slides need not be copied: 2,000 resamples of 10,000 slides take
a second, where drawing and sorting each one takes minutes. What a resample lacks (a class, a pair) makes its value NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pipeline.config.data import TaskConfig
from pipeline.inference.metrics import MEASURES, Bools, Floats, Ints, expected_time, labelled

Counts = npt.NDArray[np.uint8]

_CELLS = 1 << 21
"""Of a block of resamples: 16 MB a temporary, which stays in the cache of most machines."""


def resampled_measures(task: TaskConfig, values: Floats, truth: Floats, weights: Counts) -> Floats:
    """(B, S) the task's `MEASURES` on each resample; arguments otherwise as of `metrics.measure`."""
    known = labelled(truth)
    if not known.any():
        return np.full((len(weights), len(MEASURES[task.kind])), np.nan)
    found = _OF_KIND[task.kind](task, values[known], truth[known])
    rows, held = max(1, _CELLS // int(known.sum())), weights[:, known]
    return np.concatenate([_table(found, held[at : at + rows]) for at in range(0, len(held), rows)])


Measure = Callable[[Counts], Floats]
"""Weights (B, n) of labelled slides -> (B,)."""


def _table(measures: list[Measure], weights: Counts) -> Floats:
    return np.stack([measure(weights) for measure in measures], axis=1)


def _classes(_task: TaskConfig, p: Floats, y: Floats) -> list[Measure]:
    shown = [1] if p.shape[1] == 2 else range(p.shape[1])
    return [_mean_area([(p[:, k], y == k) for k in shown]), _share(p.argmax(axis=1) == y)]


def _labels(_task: TaskConfig, p: Floats, y: Floats) -> list[Measure]:
    areas = _mean_area([(p[:, k], y[:, k] == 1) for k in range(p.shape[1])])
    return [areas, _share(((p >= 0.5) == (y == 1)).all(axis=1))]


def _numbers(_task: TaskConfig, p: Floats, y: Floats) -> list[Measure]:
    return [lambda weights: _r_squared(p[:, 0], y, weights), _share(np.abs(p[:, 0] - y))]


def _times(task: TaskConfig, p: Floats, y: Floats) -> list[Measure]:
    expected = expected_time(p, task.bins)
    return [lambda weights: _concordance(expected, y[:, 0], y[:, 1] == 1, weights)]


_OF_KIND: dict[str, Callable[[TaskConfig, Floats, Floats], list[Measure]]] = {
    "binary": _classes,
    "multiclass": _classes,
    "multilabel": _labels,
    "regression": _numbers,
    "survival": _times,
}


def _share(each: Floats | Bools) -> Measure:
    """The mean of what each slide (n,) has."""
    numbers = each.astype(np.float64)

    def measure(weights: Counts) -> Floats:
        return _over(weights @ numbers, weights.sum(axis=1, dtype=np.int64))

    return measure


def _over(numerator: Floats, denominator: Floats | Ints) -> Floats:
    """The quotient; NaN where nothing is divided."""
    found: Floats = np.full(np.shape(numerator), np.nan)
    np.divide(numerator, denominator, out=found, where=np.asarray(denominator) > 0)
    return found


def _mean_area(scored: list[tuple[Floats, Bools]]) -> Measure:
    """Mean AUC of classes, (scores (n,), which slides hold it (n,)); those that cannot be measured are left out."""
    areas = [_area(scores, held) for scores, held in scored if 0 < held.sum() < len(held)]

    def measure(weights: Counts) -> Floats:
        found = np.stack([area(weights) for area in areas]) if areas else np.full((1, len(weights)), np.nan)
        there = ~np.isnan(found)
        return _over(np.where(there, found, 0.0).sum(axis=0), there.sum(axis=0))

    return measure


def _area(scores: Floats, positive: Bools) -> Measure:
    """AUC: of each positive slide, the weight of the negative ones below it, and half of that of equal ones."""
    negatives = np.flatnonzero(~positive)
    ascending = negatives[np.argsort(scores[negatives], kind="stable")]
    below = np.searchsorted(scores[ascending], scores[positive], side="left")
    reached = np.searchsorted(scores[ascending], scores[positive], side="right")

    def measure(weights: Counts) -> Floats:
        passed = np.zeros((len(weights), len(ascending) + 1), np.int64)
        np.cumsum(weights[:, ascending], axis=1, out=passed[:, 1:])
        held = weights[:, positive].astype(np.int64)
        twice = (held * (passed[:, below] + passed[:, reached])).sum(axis=1)
        return _over(twice / 2, held.sum(axis=1) * passed[:, -1])

    return measure


def _r_squared(predicted: Floats, true: Floats, weights: Counts) -> Floats:
    centred = true - true.mean()
    counts = weights.astype(np.float64)
    total = counts @ np.square(centred) - _over(np.square(counts @ centred), counts.sum(axis=1))
    several = np.where(weights > 0, true, -np.inf).max(axis=1) > np.where(weights > 0, true, np.inf).min(axis=1)
    return 1 - _over(counts @ np.square(true - predicted), np.where(several, total, 0.0))


def _concordance(predicted: Floats, time: Floats, event: Bools, weights: Counts) -> Floats:
    """Harrell's index: pairs, whose weight is the product of their slides', block by block."""
    counts = weights.astype(np.float32)  # sums of a row's weights stay below 2^24
    right, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    firsts = np.flatnonzero(event)
    for block in np.array_split(firsts, max(1, len(firsts) * len(time) // _CELLS)):
        comparable = time[block, None] < time[None, :]
        order = 0.5 + np.sign(predicted[None, :] - predicted[block, None]) / 2
        own = counts[:, block].astype(np.float64)
        right += (own * (counts @ (order * comparable).astype(np.float32).T)).sum(axis=1)
        pairs += (own * (counts @ comparable.astype(np.float32).T)).sum(axis=1)
    return _over(right, pairs)
