"""Predictions by stratum: each column of a cohort that parts the slides into few groups, such as site or scanner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TaskConfig
from pipeline.inference.metrics import MEASURES, Bools, Floats, labelled, measure

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
    measures: Mapping[str, float] | None
    """The task's `MEASURES`, NaN where the group's labels cannot give one; None: too few patients to judge."""


def strata(
    slides: Sequence[CohortSlide],
    task: TaskConfig,
    values: Floats,
    truths: Floats,
    few: int = FEW,
    among: Bools | None = None,
) -> list[Stratum]:
    """All groups of all columns that the slides have beyond the cohort's own, and that part them into 2 to `MOST`.

    Args:
        slides: n of a cohort.
        task: what was predicted.
        values: (n, K).
        truths: as of `metrics.measure`; slides without a label are in no group's count.
        few: patients below which a group is not judged.
        among: (n,) the slides that are counted and measured; None: all.
    """
    known = labelled(truths) if among is None else labelled(truths) & among
    patients = np.asarray([slide.patient_id for slide in slides], dtype=np.str_)
    found = []
    for column in dict.fromkeys(name for slide in slides for name in slide.extra):
        groups = np.asarray([slide.extra.get(column, "") for slide in slides], dtype=np.str_)
        names = np.unique(groups)
        for name in names if 2 <= len(names) <= MOST else ():
            inside = known & (groups == name)
            count = len(np.unique(patients[inside]))
            measures = None
            if count >= few:
                numbers = measure(task, values[inside], truths[inside])
                measures = dict(zip(MEASURES[task.kind], numbers, strict=True))
            found.append(Stratum(column, str(name) or "(empty)", task.name, int(inside.sum()), count, measures))
    return found
