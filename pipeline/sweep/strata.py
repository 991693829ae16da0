"""A cell by the groups of its cohort: each other column that parts the slides into few, such as site or scanner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config.data import TaskConfig
from pipeline.inference.metrics import MEASURES, Floats, labelled, measure
from pipeline.results.strata import MOST
from pipeline.sweep.cells import Cell
from pipeline.sweep.cohorts import SweptCohort


@dataclass(frozen=True)
class SweptStratum:
    """One group of one column, for one task of one cell."""

    cell: Cell
    task: str
    column: str
    value: str
    slides: int
    patients: int
    measures: Mapping[str, float] | None
    """The task's `MEASURES`, NaN where the group's labels cannot give one; None: too few patients to judge."""


def cell_strata(
    cohort: SweptCohort,
    cell: Cell,
    task: TaskConfig,
    values: Floats,
    truths: Floats,
    shared: npt.NDArray[np.bool_],
    few: int,
) -> list[SweptStratum]:
    """All groups of all columns that part the cohort into 2 to `MOST`.

    Args:
        cohort: n slides.
        cell: whose predictions they are.
        task: what was predicted.
        values: (n, K).
        truths: as of `metrics.measure`.
        shared: (n,) the slides that are looked at.
        few: patients below which a group is not judged.
    """
    known = shared & labelled(truths)
    patients = np.asarray(cohort.patients, dtype=np.str_)
    found = []
    for column in dict.fromkeys(name for slide in cohort.slides for name in slide.extra):
        groups = np.asarray([slide.extra.get(column, "") for slide in cohort.slides], dtype=np.str_)
        names = np.unique(groups)
        for name in names if 2 <= len(names) <= MOST else ():
            inside = known & (groups == name)
            count = len(np.unique(patients[inside]))
            measures = None
            if count >= few:
                numbers = measure(task, values[inside], truths[inside])
                measures = dict(zip(MEASURES[task.kind], numbers, strict=True))
            found.append(
                SweptStratum(cell, task.name, column, str(name) or "(empty)", int(inside.sum()), count, measures)
            )
    return found
