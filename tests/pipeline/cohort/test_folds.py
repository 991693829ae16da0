"""Folds by patient: every patient tests once, and never where it trains or validates."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from pipeline.cohort.folds import fold_names, with_fold
from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.config.data import SplitConfig, TaskConfig
from pipeline.errors import CohortError

TASK = TaskConfig(name="t", column="label")
SHARES = SplitConfig()


def _cohort(patients: int = 23, **changes: object) -> Cohort:
    """Two slides a patient, every fifth patient positive; sites a to c."""
    slides = tuple(
        CohortSlide(
            f"s{n}-{k}", f"/s{n}-{k}", f"p{n}", None, None, {"t": "1" if n % 5 == 0 else "0"}, {"site": "abc"[n % 3]}
        )
        for n in range(patients)
        for k in range(2)
    )
    return replace(Cohort("cohort.csv", slides), **changes)  # type: ignore[arg-type]


def _split(cohort: Cohort, folds: int | str, fold: int, seed: int = 0) -> dict[str, str]:
    found = with_fold(cohort, folds, fold, SHARES, seed, [TASK])
    splits: dict[str, set[str]] = {}
    for slide in found.slides:
        splits.setdefault(slide.patient_id, set()).add(str(slide.split))
    assert all(len(held) == 1 for held in splits.values())  # a patient stands or falls together
    return {patient: next(iter(held)) for patient, held in splits.items()}


@pytest.mark.parametrize("folds", [2, 5, 7])
def test_every_patient_tests_once_and_classes_are_spread(folds: int) -> None:
    tests: Counter[str] = Counter()
    for fold in range(folds):
        split = _split(_cohort(), folds, fold)
        own = [patient for patient, name in split.items() if name == "test"]
        tests.update(own)
        positive = [patient for patient in own if int(patient[1:]) % 5 == 0]
        assert abs(len(own) - 23 / folds) < 1
        assert abs(len(positive) - 5 / folds) < 1
        assert Counter(split.values())["val"] == pytest.approx(0.2 * (23 - len(own)), abs=2)
        assert {int(p[1:]) % 5 == 0 for p, name in split.items() if name == "val"} == {True, False}
    assert set(tests.values()) == {1}
    assert len(tests) == 23


def test_folds_depend_on_seed_and_patients_and_not_on_the_order_of_rows() -> None:
    cohort = _cohort()
    turned = replace(cohort, slides=cohort.slides[::-1])
    assert _split(cohort, 5, 2) == _split(turned, 5, 2)
    assert _split(cohort, 5, 2) != _split(cohort, 5, 2, seed=1)
    assert _split(cohort, 5, 2) != _split(cohort, 5, 3)


def test_a_column_names_the_folds() -> None:
    cohort = _cohort()
    assert fold_names(cohort, "site") == ["a", "b", "c"]
    split = _split(cohort, "site", 1)
    assert {patient for patient, name in split.items() if name == "test"} == {f"p{n}" for n in range(1, 23, 3)}


def test_what_makes_no_folds_is_refused() -> None:
    cohort = _cohort()
    with pytest.raises(CohortError, match="there are only 23 patients"):
        fold_names(cohort, 24)
    with pytest.raises(CohortError, match="columns that may be named: site"):
        fold_names(cohort, "scanner")
    torn = replace(cohort, slides=(replace(cohort.slides[0], extra={"site": "b"}), *cohort.slides[1:]))
    with pytest.raises(CohortError, match="patients stand in two folds: p0"):
        fold_names(torn, "site")
    with pytest.raises(CohortError, match="has a split column"):
        fold_names(replace(cohort, slides=tuple(replace(s, split="train") for s in cohort.slides)), 3)


def test_without_a_share_nobody_validates() -> None:
    found = with_fold(_cohort(), 3, 0, SplitConfig(train=0.75, val=0.0, test=0.25), 0, [TASK])
    assert {slide.split for slide in found.slides} == {"train", "test"}
