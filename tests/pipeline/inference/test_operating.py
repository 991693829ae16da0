from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, confusion_matrix

from pipeline.inference.operating import Proportion, choose_threshold, decide, reliability


def test_an_interval_knows_n_at_the_ends() -> None:
    assert Proportion(20, 20).bounds == pytest.approx((0.8389, 1.0), abs=1e-4)  # Wilson: n / (n + z^2)
    assert Proportion(0, 20).bounds == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert Proportion(0, 0).bounds == (0.0, 1.0)
    assert np.isnan(Proportion(0, 0).value)


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=60))
def test_decisions_are_the_confusion_matrix(rows: list[tuple[int, bool]]) -> None:
    scores, positive = np.array([score / 20 for score, _ in rows]), np.array([held for _, held in rows])
    found = decide(scores, positive)
    (tn, fp), (fn, tp) = confusion_matrix(positive, scores >= 0.5, labels=[False, True]).tolist()
    assert (found.sensitivity.hits, found.sensitivity.n) == (tp, tp + fn)
    assert (found.specificity.hits, found.specificity.n) == (tn, tn + fp)
    assert (found.positive_value.hits, found.positive_value.n) == (tp, tp + fp)
    assert (found.negative_value.hits, found.negative_value.n) == (tn, tn + fn)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=80))
def test_calibration_is_sklearns(rows: list[tuple[float, bool]]) -> None:
    scores, positive = np.array([score for score, _ in rows]), np.array([held for _, held in rows])
    edge = np.isclose(scores * 10, np.round(scores * 10)) & (scores < 1)
    scores = np.where(edge, np.clip(scores + 0.013, 0, 1), scores)  # bins are closed at other ends
    found = reliability(scores, positive)
    share, predicted = calibration_curve(positive, scores, n_bins=10, pos_label=True)
    np.testing.assert_allclose(found.share, share)
    np.testing.assert_allclose(found.predicted, predicted)
    assert found.brier == pytest.approx(brier_score_loss(positive, scores, pos_label=True))
    assert found.error == pytest.approx(np.average(abs(share - predicted), weights=found.counts))
    assert found.counts.sum() == len(rows)
    assert (found.low <= found.share + 1e-12).all()
    assert (found.share <= found.high + 1e-12).all()


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=40))
def test_no_other_threshold_parts_the_slides_better(rows: list[tuple[int, bool]]) -> None:
    scores, positive = np.array([score / 9 for score, _ in rows]), np.array([held for _, held in rows])
    found = choose_threshold(scores, positive)
    if positive.all() or not positive.any():
        assert found is None
        return
    assert found is not None

    def gain(threshold: float) -> float:
        decision = decide(scores, positive, threshold)
        return decision.sensitivity.value + decision.specificity.value

    assert gain(found) == pytest.approx(max(gain(threshold) for threshold in np.arange(-0.05, 1.1, 0.01)))


def test_a_threshold_lies_between_what_it_parts() -> None:
    scores, positive = np.array([0.1, 0.2, 0.6, 0.9]), np.array([False, False, True, True])
    assert choose_threshold(scores, positive) == pytest.approx(0.4)
