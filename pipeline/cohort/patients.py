"""Patients of several slides: which are one bag, and what must be said of all of them alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipeline.cohort.labels import MISSING, Label
from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.config.data import TaskConfig
from pipeline.errors import CohortError

_SHOWN = 20


def bag_name(slide: CohortSlide, specimen: str | None) -> str:
    """Of the bag that a slide is in: its patient's, or `<patient>/<specimen>` where a column says which (checked)."""
    return slide.patient_id if specimen is None else f"{slide.patient_id}/{slide.extra[specimen]}"


def check_specimens(uri: str, slides: Sequence[CohortSlide], specimen: str | None) -> None:
    """Whether each slide says which specimen of its patient it is of, where a column is to tell.

    Args:
        uri: of the cohort.
        slides: of it.
        specimen: name of the column, `cohort.specimen`.

    Raises:
        CohortError: the column is absent, empty in some rows, or makes two patients' bags of one name.
    """
    if specimen is None or not slides:
        return
    if specimen not in slides[0].extra:
        others = ", ".join(map(repr, slides[0].extra)) or "none"
        raise CohortError(
            uri, [f"cohort.specimen: no column {specimen!r} beside those with meanings of their own; found {others}"]
        )
    empty = [slide.slide_id for slide in slides if slide.extra[specimen].casefold() in MISSING]
    problems = [f"column {specimen!r} (cohort.specimen) is empty for slide {name!r}" for name in empty]
    owners: dict[str, str] = {}
    for slide in slides:
        name = bag_name(slide, specimen)
        if owners.setdefault(name, slide.patient_id) != slide.patient_id:
            both = f"{owners[name]!r} and {slide.patient_id!r}"
            problems.append(f"{name!r} names specimens of the patients {both}; rename one, without a slash")
    _raise(uri, problems, "problems")


def check_agreement(cohort: Cohort, tasks: Sequence[TaskConfig], specimen: str | None = None) -> None:
    """Whether the slides of each bag have one label a task; some may have none.

    Raises:
        CohortError: those of some patients differ, or, where a column says so, of some specimens.
    """
    whole = "patient" if specimen is None else "specimen"
    problems: list[str] = []
    for task in tasks:
        found: defaultdict[str, dict[Label, str]] = defaultdict(dict)
        for slide in cohort.slides:
            label = slide.labels[task.name]
            if label is not None:
                found[bag_name(slide, specimen)].setdefault(label, slide.slide_id)
        for name, labels in found.items():
            if len(labels) > 1:
                told = ", ".join(f"{label!r} on {slide}" for label, slide in labels.items())
                problems.append(
                    f"{whole} {name!r} has several labels in column {task.column!r}: {told}; give all of a "
                    f"{whole}'s slides one label, or set cohort.bag=slide"
                )
    _raise(cohort.uri, problems, f"{whole}s")


def _raise(uri: str, problems: Sequence[str], what: str) -> None:
    """CohortError of the first problems, where there are any."""
    if problems:
        more = [f"and {len(problems) - _SHOWN} more {what}"] if len(problems) > _SHOWN else []
        raise CohortError(uri, [*problems[:_SHOWN], *more])
