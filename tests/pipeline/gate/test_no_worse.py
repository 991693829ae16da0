"""The bounds of a difference: against their definitions, and how often they let a worse model through."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.data import TaskConfig
from pipeline.gate.no_worse import Bounds, bounds
from pipeline.inference.metrics import Floats, measure
from pipeline.inference.resampling import delong
from tests.pipeline.gate.made import TASK

GRADES = TaskConfig(name="grade", column="g", kind="multiclass", classes=("1", "2", "3", "4"))


def _two(scores: Floats) -> Floats:
    return np.stack([1 - scores, scores], axis=1)


def _bounds(
    candidate: Floats, champion: Floats, positive: Floats, margin: float, patients: int | None = None
) -> Bounds:
    labels = [TASK.classes[int(one)] for one in positive]
    owners = [f"p{n % (patients or len(labels))}" for n in range(len(labels))]
    values = (_two(candidate), _two(champion))
    return bounds(TASK, "auc", values, positive, labels, owners, margin=margin, level=0.95, resamples=200, seed=0)


def rare(generator: np.random.Generator, positive: Floats, share: float) -> tuple[Floats, Floats]:
    """A champion of AUC .95; and a candidate that is as good, but sees nothing in a share of the positive slides."""
    champion = generator.standard_normal(len(positive)) + 2.33 * positive
    candidate = champion + 0.05 * generator.standard_normal(len(positive))
    candidate[(positive == 1) & (generator.random(len(positive)) < share)] = -9
    return candidate, champion


@given(st.integers(0, 10**6), st.integers(12, 60), st.sampled_from([0.02, 0.1, 0.3]), st.sampled_from([0, 4]))
@settings(max_examples=30, deadline=None)
def test_no_bound_lies_above_another_one(seed: int, n: int, margin: float, shared: int) -> None:
    generator = np.random.default_rng(seed)
    positive = (np.arange(n) % 3 == 0).astype(np.float64)
    first, second = generator.standard_normal((2, n)) + positive
    patients = n - n // shared if shared else n
    found = _bounds(first, second, positive, margin, patients)
    values = [measure(TASK, _two(each), positive)[0] for each in (first, second)]
    assert found.value == pytest.approx(values[0] - values[1])
    assert found.low <= found.shown <= found.value + 1e-12
    owners = [f"p{k % patients}" for k in range(n)]
    assert found.shown <= delong((first, second), positive == 1, owners, alpha=0.1).low
    few = min(len({owners[k] for k in range(n) if positive[k] == side}) for side in (0, 1))
    few = min(few, patients // 2)
    assert found.trials == few
    assert found.low <= found.value - 1.64485 * np.sqrt(margin * (1 - margin) / few) + 1e-6
    if found.value + margin > 0.01:  # as many as are said to be needed are enough
        reach = 1.64485 * np.sqrt(margin * (1 - margin) / found.needed)
        assert found.value - reach > -margin - 1e-4


def test_a_mean_over_classes_may_lose_all_in_one_of_them() -> None:
    truth = np.repeat(np.arange(4.0), [5, 40, 40, 40])
    values = np.random.default_rng(0).dirichlet(np.ones(4), len(truth))
    labels = [GRADES.classes[int(one)] for one in truth]
    owners = [f"p{n}" for n in range(len(truth))]
    found = bounds(
        GRADES, "auc", (values, values), truth, labels, owners, margin=0.02, level=0.95, resamples=100, seed=0
    )
    assert (found.value, found.shown, found.trials) == (0, 0, 5)
    assert found.low == pytest.approx(-1.64485 * np.sqrt(0.08 * 0.92 / 5) / 4, rel=1e-4)


@pytest.mark.parametrize(("n", "most"), [(50, 0.0), (200, 0.05)])
def test_a_model_that_is_blind_to_a_rare_kind_is_not_let_through(n: int, most: float) -> None:
    """Worse by just the margin: at most 5% may pass; by what the test shows alone, it were many more."""
    generator, positive = np.random.default_rng(5), (np.arange(n) % 2).astype(np.float64)
    found = [_bounds(*rare(generator, positive, 0.05 / 0.95), positive, 0.05) for _ in range(60)]
    assert np.mean([one.low > -0.05 for one in found]) <= most
    assert n > 50 or np.mean([one.shown > -0.05 for one in found]) > 0.12
