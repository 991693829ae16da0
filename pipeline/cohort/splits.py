"""Which slides train and which test: given by the cohort, or drawn by patient; and what must hold before either."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.cohort.labels import lacks, stratum
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
            problems.append(f"split {split} has no slide ({counted}); add slides or change cohort.split")
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


def with_splits(cohort: Cohort, fractions: SplitConfig, seed: int, tasks: Sequence[TaskConfig]) -> Cohort:
    """Give every patient a split, stratified by the first task's label; unchanged when there are splits.

    A patient's stratum is the highest (`labels.stratum`) of its slides. The result depends on the
    seed, the patients' ids and their labels alone, not on the order of the rows. A class with at least as many
    patients as there are splits stands in each of them.
    """
    if cohort.has_splits:
        return cohort
    strata: defaultdict[int, list[str]] = defaultdict(list)
    for patient, rank in _strata(cohort, tasks).items():
        strata[rank].append(patient)
    split_of: dict[str, str] = {}
    for patients in strata.values():
        patients.sort(key=lambda patient: hashlib.sha256(f"{seed}\0{patient}".encode()).digest())
        names = [name for name, size in _shares(len(patients), fractions).items() for _ in range(size)]
        split_of.update(zip(patients, names, strict=True))
    return replace(cohort, slides=tuple(replace(slide, split=split_of[slide.patient_id]) for slide in cohort.slides))


def _strata(cohort: Cohort, tasks: Sequence[TaskConfig]) -> dict[str, int]:
    """Patient -> highest stratum of its slides in the first task, -1 when it has no label."""
    strata: dict[str, int] = {}
    for slide in cohort.slides:
        rank = stratum(tasks[0], slide.labels[tasks[0].name]) if tasks else -1
        strata[slide.patient_id] = max(rank, strata.get(slide.patient_id, -1))
    return strata


def _shares(patients: int, fractions: SplitConfig) -> dict[str, int]:
    """How many patients of a stratum go where: largest remainders, but no split empty while another has two."""
    wanted = {name: getattr(fractions, name) for name in ("train", "test", "val")}
    wanted = {name: share for name, share in wanted.items() if share > 0}
    if patients <= len(wanted):
        return {name: int(place < patients) for place, name in enumerate(wanted)}
    sizes = {name: int(patients * share) for name, share in wanted.items()}
    by_remainder = sorted(wanted, key=lambda name: sizes[name] - patients * wanted[name])
    for name in by_remainder[: patients - sum(sizes.values())]:
        sizes[name] += 1
    for name in wanted:
        if not sizes[name]:
            sizes[max(sizes, key=lambda other: sizes[other])] -= 1
            sizes[name] = 1
    return sizes
