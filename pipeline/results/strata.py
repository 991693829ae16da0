"""The test by stratum: each column of the cohort that parts the slides into few groups, such as site or scanner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.inference.metrics import MEASURES, measure
from pipeline.results.evaluate import Evaluation, TaskResult

MOST = 12
"""Groups of a column that is shown; one of more is a name or a number, not a stratum."""
FEW = 10
"""Patients below which a group is too small to judge."""


@dataclass(frozen=True)
class Stratum:
    """One group of one column, for one task."""

    column: str
    value: str
    task: str
    slides: int
    patients: int
    measures: dict[str, float] | None
    """The task's `MEASURES`, NaN where the group's labels cannot give one; None: too few patients to judge."""


def strata(evaluation: Evaluation) -> list[Stratum]:
    """All groups of all columns that the cohort has beyond its own, in their order; none without such a column."""
    slides = [slide for slide, _ in evaluation.slides]
    columns = dict.fromkeys(name for slide in slides for name in slide.extra)
    found: list[Stratum] = []
    for column in columns:
        groups = sorted({slide.extra.get(column, "") for slide in slides})
        if 2 <= len(groups) <= MOST:
            found += [_stratum(evaluation, result, column, value) for value in groups for result in evaluation.tasks]
    return found


def _stratum(evaluation: Evaluation, result: TaskResult, column: str, value: str) -> Stratum:
    rows = [evaluation.slides[place][0] for place in result.slides.tolist()]
    inside = np.array([slide.extra.get(column, "") == value for slide in rows], np.bool_)
    patients = len({slide.patient_id for slide, held in zip(rows, inside, strict=True) if held})
    measures = None
    if patients >= FEW:
        numbers = measure(result.task, result.values[inside], result.truth[inside])
        measures = dict(zip(MEASURES[result.task.kind], numbers, strict=True))
    return Stratum(column, value or "(empty)", result.task.name, int(inside.sum()), patients, measures)
