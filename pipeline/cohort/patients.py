"""Patients of several slides: what must be said of all of them alike where they are one bag."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipeline.cohort.labels import Label
from pipeline.cohort.table import Cohort
from pipeline.config.data import TaskConfig
from pipeline.errors import CohortError

_SHOWN = 20


def check_agreement(cohort: Cohort, tasks: Sequence[TaskConfig]) -> None:
    """Whether the slides of each patient have one label a task; some may have none.

    Raises:
        CohortError: those of some patients differ.
    """
    problems: list[str] = []
    for task in tasks:
        found: defaultdict[str, dict[Label, str]] = defaultdict(dict)
        for slide in cohort.slides:
            label = slide.labels[task.name]
            if label is not None:
                found[slide.patient_id].setdefault(label, slide.slide_id)
        for patient, labels in found.items():
            if len(labels) > 1:
                told = ", ".join(f"{label!r} on {slide}" for label, slide in labels.items())
                problems.append(
                    f"patient {patient!r} has several labels in column {task.column!r}: {told}; give all of a "
                    "patient's slides one label, or set cohort.bag=slide"
                )
    if problems:
        more = [f"and {len(problems) - _SHOWN} more patients"] if len(problems) > _SHOWN else []
        raise CohortError(cohort.uri, [*problems[:_SHOWN], *more])
