"""Plans of resamples, and differences against scipy, slow twins and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from pipeline.config.data import TaskConfig
from pipeline.errors import StageError
from pipeline.inference.metrics import measure
from pipeline.inference.resampling import ResamplingPlan, delong, draw_plan, holm, paired_difference, read_plan
from pipeline.inference.weighted import resampled_measures
from tests.oracle import clustered_delong, holm_by_steps

PATIENTS = ["b", "a", "c", "a", "d", "e", "f", "g"]
STRATA = [0, 0, 1, 1, 1, 0, -1, 0]
BINARY = TaskConfig(name="t", column="a")


def test_a_plan_draws_as_many_patients_of_each_stratum_as_there_are() -> None:
    plan = draw_plan(PATIENTS, STRATA, 500, seed=3)
    assert plan.patients == ("a", "b", "c", "d", "e", "f", "g")
    assert plan.strata == (1, 0, 1, 1, 0, -1, 0)  # a patient's is the highest of his slides'
    for stratum, size in ((1, 3), (0, 3), (-1, 1)):
        assert (plan.counts[:, np.array(plan.strata) == stratum].sum(axis=1) == size).all()
    assert (plan.counts[:, 5] == 1).all()  # whoever is alone in his stratum is in every resample
    assert plan.counts.std(axis=0)[:5].min() > 0.5


def test_slides_stand_or_fall_with_their_patient() -> None:
    plan = draw_plan(PATIENTS, STRATA, 50, seed=3)
    weights = plan.weights(PATIENTS)
    assert weights.shape == (50, 8)
    np.testing.assert_array_equal(weights[:, 1], weights[:, 3])
    np.testing.assert_array_equal(weights[:, 1], plan.counts[:, 0])
    np.testing.assert_array_equal(plan.weights(["g", "b"]), plan.counts[:, [6, 1]])
    with pytest.raises(StageError, match=r"1 patients are not of the plan, such as 'x'"):
        plan.weights(["a", "x"])


def test_a_plan_depends_on_seed_and_patients_and_not_on_the_order_of_slides() -> None:
    plan, order = draw_plan(PATIENTS, STRATA, 50, seed=3), [4, 2, 7, 1, 0, 3, 6, 5]
    turned = draw_plan([PATIENTS[i] for i in order], [STRATA[i] for i in order], 50, seed=3)
    assert turned.digest == plan.digest
    others = (
        draw_plan(PATIENTS, STRATA, 50, 4),
        draw_plan(PATIENTS, STRATA, 51, 3),
        draw_plan([*"hacadefg"], STRATA, 50, 3),
    )
    assert len({plan.digest, *(other.digest for other in others)}) == 4


def test_a_plan_is_kept_whole() -> None:
    plan = draw_plan(PATIENTS, STRATA, 53, seed=3)
    found = read_plan(plan.table())
    assert (found.seed, found.patients, found.strata, found.digest) == (3, plan.patients, plan.strata, plan.digest)


def _models(n: int, seed: int, gap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of two models, much alike, and the truth."""
    generator = np.random.default_rng(seed)
    positive = np.arange(n) % 3 == 0
    shared = generator.normal(positive * 1.0, 1)
    return shared + generator.normal(0, 0.5, n), shared - gap * positive + generator.normal(0, 0.5, n), positive


def test_a_difference_is_paired() -> None:
    """What both models share does not blur it: alone their intervals are wide, and that of the difference narrow."""
    first, second, positive = _models(240, 5, 0.0)
    plan = draw_plan([str(n) for n in range(240)], positive.astype(int).tolist(), 1000, seed=1)
    weights, areas, drawn = plan.weights([str(n) for n in range(240)]), [], []
    for scores in (first, second):
        values = np.stack([-scores, scores], axis=1)
        areas.append(measure(BINARY, values, positive.astype(float))[0])
        drawn.append(resampled_measures(BINARY, values, positive.astype(float), weights)[:, 0])
    found = paired_difference((areas[0], areas[1]), (drawn[0], drawn[1]))
    assert found.value == pytest.approx(roc_auc_score(positive, first) - roc_auc_score(positive, second))
    alone = np.subtract(*np.quantile(drawn[0], (0.975, 0.025)))
    assert found.high - found.low < 0.8 * alone
    unpaired = np.subtract(*np.quantile(drawn[0] - np.roll(drawn[1], 1), (0.975, 0.025)))
    assert found.high - found.low < 0.6 * unpaired
    closed = delong((first, second), positive, [str(n) for n in range(240)])
    assert (found.low, found.high) == pytest.approx((closed.low, closed.high), abs=0.01)
    assert found.p == pytest.approx(closed.p, abs=0.1)


def test_p_excludes_nothing_where_the_interval_does_not() -> None:
    generator = np.random.default_rng(2)
    for shift in (0.0, 1.5, 1.9, 2.05, 3.0, -2.5):
        drawn = generator.normal(shift, 1, 4001)
        found = paired_difference((shift, 0.0), (drawn, np.zeros(4001)))
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
        assert found.p == pytest.approx(2 * norm.sf(abs(shift)), abs=0.03)
    wide = paired_difference((1.9, 0.0), (generator.normal(1.9, 1, 4001), np.zeros(4001)), alpha=0.2)
    assert wide.high - wide.low == pytest.approx(2 * norm.ppf(0.9), abs=0.1)


def test_equal_models_do_not_differ_and_few_patients_exclude_little() -> None:
    same = np.full(500, 1.0)
    assert paired_difference((1.0, 1.0), (same, same)).p == 1.0
    found = paired_difference((1.0, 1.0), (same, same), least=0.7)
    assert (found.low, found.high, found.p) == pytest.approx((-0.3, 0.3, 1.0))


def test_resamples_that_cannot_be_measured_are_left_out_until_hardly_any_is_left() -> None:
    drawn = np.where(np.arange(100) < 40, np.nan, 0.25)
    found = paired_difference((0.75, 0.5), (drawn + 0.5, np.full(100, 0.5)))
    assert (found.low, found.high) == (0.25, 0.25)
    with pytest.raises(StageError, match="only 40 of 100 resamples"):
        paired_difference((0.75, 0.5), (np.where(np.isnan(drawn), 1.0, np.nan), np.zeros(100)))


@given(st.integers(0, 10**6), st.integers(5, 30))
def test_delong_agrees_with_its_definition_ties_and_patients_included(seed: int, n: int) -> None:
    generator = np.random.default_rng(seed)
    positive = generator.permutation(np.arange(n) < generator.integers(2, n - 1))
    scores = generator.integers(0, 5, (2, n)).astype(float)
    patients = [f"p{k}" for k in generator.integers(0, n, n)]
    found = delong((scores[0], scores[1]), positive, patients)
    value, error = clustered_delong(scores[0].tolist(), scores[1].tolist(), positive.tolist(), patients)
    assert found.value == pytest.approx(value)
    assert found.high - found.value == pytest.approx(norm.ppf(0.975) * error, abs=1e-9)


def test_delong_of_equal_models() -> None:
    scores, positive = np.arange(6.0), np.arange(6) % 2 == 0
    found = delong((scores, scores), positive, list("abcdef"))
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


@pytest.mark.slow
def test_p_is_as_rare_as_it_says_where_nothing_differs() -> None:
    """Of two models that are equally good, DeLong and the resamples find a difference in one of twenty samples."""
    below, trials = np.zeros(2), 300
    for trial in range(trials):
        first, second, positive = _models(90, trial, 0.0)
        patients, drawn, areas = [str(n) for n in range(90)], [], []
        plan = draw_plan(patients, positive.astype(int).tolist(), 400, seed=trial)
        for scores in (first, second):
            values = np.stack([-scores, scores], axis=1)
            areas.append(measure(BINARY, values, positive.astype(float))[0])
            drawn.append(resampled_measures(BINARY, values, positive.astype(float), plan.weights(patients))[:, 0])
        below += (
            delong((first, second), positive, patients).p < 0.05,
            paired_difference((areas[0], areas[1]), (drawn[0], drawn[1])).p < 0.05,
        )
    assert (below / trials > 0.015).all()
    assert (below / trials < 0.1).all()


@given(st.lists(st.floats(0, 1), max_size=9))
def test_holm_is_the_stepwise_rule(ps: list[float]) -> None:
    adjusted = holm(ps)
    for alpha in (0.01, 0.05, 0.3):
        assert [p <= alpha for p in adjusted] == holm_by_steps(ps, alpha)
    assert all(0 <= p <= q <= 1 for p, q in zip(ps, adjusted, strict=True))


def test_a_plan_of_ten_thousand_patients_is_small() -> None:
    patients = [str(n) for n in range(10_000)]
    plan: ResamplingPlan = draw_plan(patients, [n % 2 for n in range(10_000)], 200, seed=0)
    assert plan.counts.nbytes == 2_000_000
    assert int(plan.counts.max()) < 12
