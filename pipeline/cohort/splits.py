"""Which slides train and which test: given by the cohort, or drawn by patient; and what must hold before either."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from pipeline.cohort.labels import lacks
from pipeline.cohort.recorded import Recorded
from pipeline.cohort.table import SPLITS, Cohort
from pipeline.config.data import SplitConfig, TaskConfig
from pipeline.errors import CohortError


def check_trainable(cohort: Cohort, tasks: Sequence[TaskConfig], splits: Sequence[str] = ("train", "test")) -> None:
    """Raise a CohortError unless each of `splits` has slides, and labels of every task that something shows in."""
    sizes = {split: len(cohort.subset(split)) for split in SPLITS}
    counted = ", ".join(f"{split} {size}" for split, size in sizes.items())
    problems = []
    for split in splits:
        if not sizes[split]:
            problems.append(
                f"split {split} has no slide ({counted}); add slides, a split column, or change cohort.split or seed"
            )
            continue
        for task in tasks:
            reason = lacks(task, [slide.labels[task.name] for slide in cohort.subset(split)])
            if reason is not None:
                found, _, remedy = reason.partition("; ")
                problems.append(
                    f"task {task.name}: split {split} has {found} in column {task.column!r}, from which nothing can be "
                    f"learned or measured; {remedy}"
                )
    if problems:
        raise CohortError(cohort.uri, problems)


def check_apart(cohort: Cohort, keys: Mapping[str, str] | None = None) -> None:
    """Raise a CohortError where one image stands in two splits under different ids: its test would be no test.

    Args:
        cohort: with splits.
        keys: slide id -> key of its content, where it is known (the tile stage); without, the URIs are compared, and
            which of a file's images is named.
    """
    holders: defaultdict[object, dict[str, str]] = defaultdict(dict)
    for slide in cohort.slides:
        key = (slide.uri, slide.series) if keys is None else keys.get(slide.slide_id)
        if key is not None and slide.split is not None:
            holders[key].setdefault(slide.split, slide.slide_id)
    same = "the same file" if keys is None else "copies of one image"
    problems = [
        f"slides {' and '.join(f'{slide_id!r} ({split})' for split, slide_id in found.items())} are {same}; remove "
        "all but one, or give them one patient_id"
        for found in holders.values()
        if len(found) > 1
    ]
    if problems:
        raise CohortError(cohort.uri, problems)


def with_splits(
    cohort: Cohort,
    shares: SplitConfig,
    seed: int,
    recorded: Recorded | None = None,
    new_patients: Literal["drawn", "train"] = "drawn",
) -> Cohort:
    """Give every patient a split; unchanged when there are splits.

    A patient's split depends on the seed, the shares and the id alone (`drawn_split`), so slides that come or go move
    nobody. Classes are as frequent in each split as chance has it.

    Args:
        cohort: which slides.
        shares: of the patients.
        seed: of what is drawn.
        recorded: patients who have a split keep it, whatever would be drawn.
        new_patients: train: those who are not recorded go into no test, which is for cohorts whose others are.
    """
    if cohort.has_splits:
        return cohort
    known = recorded or Recorded()
    if new_patients == "train" and known.splits:
        shares = SplitConfig(train=shares.train + shares.test, val=shares.val, test=0.0)
    split_of = {
        slide.patient_id: known.split(slide.patient_id) or drawn_split(slide.patient_id, shares, seed)
        for slide in cohort.slides
    }
    return cohort.with_splits(lambda slide: split_of[slide.patient_id])


def drawn_split(patient_id: str, shares: SplitConfig, seed: int) -> str:
    """The split of one patient: a number from 0 to 1 by sha256, cut into the shares of test, val and train.

    In this order, so that another share of val moves nobody into or out of test.
    """
    digest = hashlib.sha256(f"{seed}\0{patient_id}".encode()).digest()
    drawn = int.from_bytes(digest[:8]) / 2**64
    if drawn < shares.test:
        return "test"
    return "val" if drawn < shares.test + shares.val or shares.train == 0 else "train"
