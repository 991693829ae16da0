"""What a task's predictions are worth, in one place: evaluate, sweeps and cross-validation all ask here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config.data import TaskConfig
from pipeline.inference.intervals import Interval, task_intervals
from pipeline.inference.metrics import MEASURES, Floats
from pipeline.inference.scores import scores
from pipeline.inference.weighted import resampled_measures


@dataclass(frozen=True, eq=False)
class Measured:
    """One task over n slides; equal to itself alone."""

    measures: Mapping[str, Interval]
    """The task's `MEASURES`: NaN where labels cannot give one, without bounds where hardly any resample can."""
    scores: Mapping[str, float]
    """All that is measured of the same slides (`scores.scores`); what they cannot give is left out."""
    resampled: Floats
    """(B, S) of the task's `MEASURES`."""


def measured(
    task: TaskConfig,
    values: Floats,
    truth: Floats,
    patients: Sequence[str],
    weights: npt.NDArray[np.uint8],
    threshold: float | None = None,
) -> Measured:
    """Measure predictions, with intervals over patients.

    Args:
        task: what was predicted.
        values: (n, K), one number for each of `task.outputs`.
        truth: (n,) or (n, W) as of `metrics.measure`; NaN where missing.
        patients: n ids.
        weights: (B, n) how often each resample holds each slide (`resampling.ResamplingPlan.weights`).
        threshold: of a binary task, chosen on validation slides.
    """
    found = scores(task, values, truth, threshold)
    whole = [found.get(name, float("nan")) for name in MEASURES[task.kind]]
    resampled = resampled_measures(task, values, truth, weights)
    intervals = task_intervals(task, truth, patients, whole, resampled)
    return Measured(dict(zip(MEASURES[task.kind], intervals, strict=True)), found, resampled)
