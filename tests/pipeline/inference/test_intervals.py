"""Intervals against scipy, slow twins, and how often they hold the truth."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from pipeline.config.data import TaskConfig
from pipeline.inference.intervals import (
    Interval,
    clopper_pearson,
    comparable_pairs,
    floor,
    interval,
    least,
    opposed_pairs,
    task_intervals,
)
from pipeline.inference.metrics import Floats, auc, measure
from pipeline.inference.resampling import draw_plan
from pipeline.inference.weighted import resampled_measures


def _task(kind: str, **fields: object) -> TaskConfig:
    return TaskConfig.model_validate({"name": "t", "column": "a", "kind": kind, **fields})


BINARY = _task("binary")


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_shares_agree_with_scipy_s_exact_test(case: tuple[int, int]) -> None:
    right, n = case
    expected = binomtest(right, n).proportion_ci(0.95, method="exact")
    assert clopper_pearson(right, n) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("n", [1, 7, 20, 113])
def test_the_floor_is_the_exact_end_of_a_perfect_result(n: int) -> None:
    assert least(n) == pytest.approx(binomtest(n, n).proportion_ci(0.95, method="exact").low)
    for share in (0.6, 0.9, least(n) - 1e-6):  # what it excludes would give a perfect result in 1 of 40 samples at most
        assert share >= least(n) or binom.pmf(n, n, share) <= 0.025


def _matching(edges: set[frozenset[str]]) -> int:
    """Most edges without a common end, by trying."""
    return next(
        size
        for size in range(len(edges), -1, -1)
        for chosen in combinations(edges, size)
        if len(frozenset().union(*chosen)) == 2 * size
    )


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), min_size=2, max_size=7))
def test_opposed_pairs_are_the_largest_matching(slides: list[tuple[str, bool]]) -> None:
    positive = {owner for owner, flag in slides if flag}
    negative = {owner for owner, flag in slides if not flag}
    edges = {frozenset((p, n)) for p in positive for n in negative if p != n}
    found = opposed_pairs(np.array([flag for _, flag in slides]), [owner for owner, _ in slides])
    assert found == max(1, _matching(edges))


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=6))
def test_comparable_pairs_are_the_largest_matching(rows: list[tuple[int, bool]]) -> None:
    edges = {
        frozenset((str(i), str(j)))
        for i, (early, event) in enumerate(rows)
        for j, (late, _) in enumerate(rows)
        if event and early < late
    }
    time, event = np.array([float(time) for time, _ in rows]), np.array([event for _, event in rows])
    twice = np.repeat(np.arange(len(rows)), 2)  # two slides a patient are no more patients
    assert comparable_pairs(time[twice], event[twice], [str(i) for i in twice]) == max(1, _matching(edges))


def _intervals(task: TaskConfig, values: Floats, truth: Floats, patients: list[str]) -> list[Interval]:
    drawn = _drawn(task, values, truth, patients)
    return task_intervals(task, truth, patients, measure(task, values, truth), drawn)


def _drawn(task: TaskConfig, values: Floats, truth: Floats, patients: list[str], seed: int = 3) -> Floats:
    """200 resamples of the patients, unstratified."""
    weights = draw_plan(patients, [0] * len(patients), 200, seed).weights(patients)
    return resampled_measures(task, values, truth, weights)


def test_a_perfect_result_of_twenty_patients_is_not_certain() -> None:
    truth = np.array([0.0] * 8 + [1.0] * 12)
    values = np.stack([1 - truth, truth], axis=1)
    area, right = _intervals(BINARY, values, truth, [f"p{n}" for n in range(20)])
    assert (area.value, area.low, area.high) == pytest.approx((1.0, 0.025 ** (1 / 8), 1.0))
    assert (right.value, right.low, right.high) == pytest.approx((1.0, 0.8315665, 1.0))
    wrong, none = _intervals(BINARY, values[:, ::-1], truth, [f"p{n}" for n in range(20)])
    assert (wrong.value, wrong.low, wrong.high) == pytest.approx((0.0, 0.0, 1 - 0.025 ** (1 / 8)))
    assert (none.value, none.low, none.high) == pytest.approx((0.0, 0.0, 1 - 0.8315665))


def test_slides_of_one_patient_and_slides_without_a_label_are_no_more_patients() -> None:
    truth = np.array(([0.0] * 8 + [1.0] * 12) * 3 + [np.nan] * 9)
    values = np.stack([1 - truth, truth], axis=1)
    values[-9:] = 0.5
    patients = [f"p{n}" for n in range(20)] * 3 + [f"q{n}" for n in range(9)]
    area, right = _intervals(BINARY, values, truth, patients)
    assert (area.low, right.low) == pytest.approx((0.025 ** (1 / 8), 0.025 ** (1 / 20)))


def test_one_fault_does_not_raise_the_lower_end() -> None:
    truth = np.array([0.0] * 10 + [1.0] * 10)
    scores = np.concatenate([np.linspace(0.0, 0.4, 10), np.linspace(0.6, 1.0, 10)])
    scores[9], scores[10] = scores[10], scores[9]
    area, right = _intervals(BINARY, np.stack([1 - scores, scores], axis=1), truth, [f"p{n}" for n in range(20)])
    assert area.value == pytest.approx(0.99)
    assert area.low == pytest.approx(least(10))
    assert (right.low, right.high) == pytest.approx(clopper_pearson(18, 20))


def test_far_from_the_ends_the_bootstrap_stays() -> None:
    generator = np.random.default_rng(5)
    truth = np.repeat([0.0, 1.0], 60)
    scores = 1 / (1 + np.exp(-generator.normal(truth * 0.8, 1)))
    values, patients = np.stack([1 - scores, scores], axis=1), [f"p{n // 2}" for n in range(120)]
    drawn = _drawn(BINARY, values, truth, patients)
    found = task_intervals(BINARY, truth, patients, measure(BINARY, values, truth), drawn)
    for place, one in enumerate(found):
        assert (one.low, one.high) == pytest.approx(np.quantile(drawn[:, place], (0.025, 0.975)))


def test_the_floor_of_a_mean_is_the_mean_of_the_floors_of_what_can_be_measured() -> None:
    grades = _task("multiclass", classes=["a", "b", "c", "never"])
    truth = np.array([0.0] * 5 + [1.0] * 9 + [2.0] * 2 + [np.nan])
    patients = [f"p{n}" for n in range(17)]
    assert floor(grades, "auc", truth, patients) == pytest.approx((least(5) + least(7) + least(2)) / 3)
    several = _task("multilabel", classes=["x", "y"])
    held = np.array([[1.0, 1.0]] * 3 + [[0.0, 1.0]] * 4)
    assert floor(several, "auc", held, patients[:7]) == least(3)
    assert floor(several, "exact_match", held, patients[:7]) == least(7)
    survival = _task("survival", event_column="e", bins=[6])
    outcomes = np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 0.0], [4.0, 1.0], [np.nan, np.nan]])
    assert floor(survival, "c_index", outcomes, patients[:5]) == least(2)
    assert floor(_task("regression"), "r2", truth, patients) is None


@pytest.mark.parametrize(("m", "n"), [(10, 10), (5, 25)])
@pytest.mark.parametrize("area", [0.85, 0.95, 0.99])
@pytest.mark.parametrize("shape", ["normal", "mixed"])
def test_the_interval_of_an_auc_holds_the_truth_near_one(m: int, n: int, area: float, shape: str) -> None:
    """Where the bootstrap alone does in 4 to 92 of 100 samples; mixed: some of a class look like the other one."""
    generator, covered, trials = np.random.default_rng(7), 0, 150
    task_truth, patients = np.repeat([1.0, 0.0], [m, n]), [str(i) for i in range(m + n)]
    at_least = floor(BINARY, "auc", task_truth, patients)
    for _ in range(trials):
        if shape == "normal":
            high = generator.normal(norm.ppf(area) * 2**0.5, 1, m)
        else:
            high = np.where(generator.random(m) < area, 9.0, -9.0) + generator.normal(size=m)
        low = generator.normal(size=n)
        scores, positive = np.concatenate([high, low]), task_truth == 1
        drawn = _auc_bootstrap(high, low, generator)
        found = interval(auc(scores, positive), drawn, at_least)
        covered += found.low <= area <= found.high
    assert covered / trials >= 0.93


def _auc_bootstrap(high: Floats, low: Floats, generator: np.random.Generator) -> Floats:
    """Resamples of an AUC without ties."""
    size = len(high) + len(low)
    weights = generator.multinomial(size, np.full(size, 1 / size), 200).astype(np.float64)
    ours, theirs = weights[:, : len(high)], weights[:, len(high) :]
    whole = ours.sum(axis=1) * theirs.sum(axis=1)
    won = ((ours @ (high[:, None] > low[None, :])) * theirs).sum(axis=1)
    areas: Floats = won[whole > 0] / whole[whole > 0]
    return areas


def test_patients_are_drawn_and_not_slides() -> None:
    """Ten patients with seven equal slides each: their spread is that of ten values."""
    generator = np.random.default_rng(4)
    errors = np.repeat(generator.random(10), 7)
    values, true, patients = errors[:, None], np.zeros(70), [f"p{n // 7}" for n in range(70)]
    by_patient = _drawn(_task("regression"), values, true, patients)[:, 1]
    alone = _drawn(_task("regression"), values, true, [str(n) for n in range(70)])[:, 1]
    assert by_patient.std() == pytest.approx(errors[::7].std() / np.sqrt(10), rel=0.15)
    assert alone.std() == pytest.approx(errors.std() / np.sqrt(70), rel=0.15)


def test_what_hardly_any_resample_holds_has_no_bounds() -> None:
    """The value stands; of a class that one patient of twenty has, two resamples of three know nothing or all."""
    some = np.array([0.7, 0.8, np.nan, 0.9])
    assert interval(0.8, some) == Interval(0.8, *np.quantile(some[~np.isnan(some)], (0.025, 0.975)))
    found = interval(0.8, np.array([0.7, np.nan, np.nan]), least_low=0.5)
    assert (found.value, np.isnan(found.low), np.isnan(found.high)) == (0.8, True, True)
    area, right = _intervals(BINARY, np.tile([0.3, 0.7], (6, 1)), np.ones(6), [f"p{n}" for n in range(6)])
    assert np.isnan([area.value, area.low, area.high]).all()
    assert (right.low, right.high) == pytest.approx(clopper_pearson(6, 6))
    nothing = _intervals(BINARY, np.tile([0.3, 0.7], (2, 1)), np.full(2, np.nan), ["a", "b"])
    assert np.isnan([one.value for one in nothing]).all()


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered, patients = 0, [str(i) for i in range(60)]
    for trial in range(200):
        errors = generator.exponential(size=60)
        resampled = _drawn(_task("regression"), errors[:, None], np.zeros(60), patients, trial)[:, 1]
        bounds = interval(float(errors.mean()), resampled)
        covered += bounds.low <= 1 <= bounds.high
    assert 0.88 <= covered / 200 <= 0.99
