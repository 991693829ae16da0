"""Cross-validation: which patients a fold tests, and which of the others validate and train for it.

A fold's own validation slides are drawn from its training patients, so that whatever is chosen on the way (a
checkpoint, when to stop, a threshold) is chosen without the slides that the fold reports on.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from pipeline.cohort.labels import stratum
from pipeline.cohort.table import Cohort
from pipeline.config.data import SplitConfig, TaskConfig
from pipeline.errors import CohortError


def fold_names(cohort: Cohort, folds: int | str) -> list[str]:
    """Of all folds, in their order: numbers from 0, or the values of the column `folds`.

    Raises:
        CohortError: the cohort has splits of its own, or cannot be parted so.
    """
    if cohort.has_splits:
        problem = f"train.folds={folds}: the cohort has a split column, which folds would override; remove one of them"
        raise CohortError(cohort.uri, [problem])
    if isinstance(folds, int):
        patients = len({slide.patient_id for slide in cohort.slides})
        if patients < folds:
            raise CohortError(cohort.uri, [f"train.folds={folds}: there are only {patients} patients; lower it"])
        return [str(number) for number in range(folds)]
    values = sorted({slide.extra.get(folds, "") for slide in cohort.slides})
    problems = []
    if len(values) < 2 or "" in values:
        there = ", ".join(sorted({name for slide in cohort.slides for name in slide.extra})) or "none"
        problems.append(
            f"train.folds={folds}: every slide needs a value in that column, and they need two at least; columns that "
            f"may be named: {there}"
        )
    owners: defaultdict[str, set[str]] = defaultdict(set)
    for slide in cohort.slides:
        owners[slide.patient_id].add(slide.extra.get(folds, ""))
    if torn := sorted(patient for patient, held in owners.items() if len(held) > 1):
        problems.append(f"train.folds={folds}: patients stand in two folds: {', '.join(torn[:5])}; give each one fold")
    if problems:
        raise CohortError(cohort.uri, problems)
    return values


def with_fold(
    cohort: Cohort, folds: int | str, fold: int, shares: SplitConfig, seed: int, tasks: Sequence[TaskConfig]
) -> Cohort:
    """The cohort with the splits of one fold: its patients test; of the others a share validates, stratified.

    Args:
        cohort: without splits.
        folds: k, drawn by patient and stratified by the first task's label; or a column whose values are the folds.
        fold: which of them tests, from 0.
        shares: of which val : train is taken.
        seed: of what is drawn. The result depends on it, the patients' ids and labels, not on the order of rows.
        tasks: the first one's labels stratify.

    Raises:
        CohortError: as `fold_names`.
    """
    names = fold_names(cohort, folds)
    strata = _strata(cohort, tasks)
    if isinstance(folds, int):
        fold_of = {patient: place % folds for place, patient in enumerate(_dealt(strata, f"{seed}"))}
    else:
        fold_of = {slide.patient_id: names.index(slide.extra[folds]) for slide in cohort.slides}
    rest = {patient: rank for patient, rank in strata.items() if fold_of[patient] != fold}
    share = shares.val / (shares.val + shares.train) if shares.val else 0.0
    validating = set[str]()
    for rank in sorted(set(rest.values())):
        own = _dealt({patient: rank for patient, held in rest.items() if held == rank}, f"{seed}\0{fold}")
        count = min(len(own) - 1, max(1, round(share * len(own)))) if share else 0
        validating |= set(own[:count])
    split_of = {patient: "test" if fold_of[patient] == fold else "train" for patient in strata}
    split_of |= dict.fromkeys(validating, "val")
    return cohort.with_splits(lambda slide: split_of[slide.patient_id])


def _strata(cohort: Cohort, tasks: Sequence[TaskConfig]) -> dict[str, int]:
    """Patient -> highest stratum of its slides in the first task."""
    strata: dict[str, int] = {}
    for slide in cohort.slides:
        rank = stratum(tasks[0], slide.labels[tasks[0].name])
        strata[slide.patient_id] = max(rank, strata.get(slide.patient_id, -1))
    return strata


def _dealt(strata: dict[str, int], seed: str) -> list[str]:
    """Patients stratum by stratum, each in an order of chance."""

    def place(patient: str) -> tuple[int, bytes]:
        return strata[patient], hashlib.sha256(f"{seed}\0{patient}".encode()).digest()

    return sorted(strata, key=place)
