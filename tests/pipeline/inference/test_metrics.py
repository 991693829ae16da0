from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, r2_score, roc_auc_score, roc_curve

from pipeline.config.data import TaskConfig
from pipeline.inference.metrics import (
    MEASURES,
    accuracy,
    auc,
    concordance,
    confusion,
    expected_time,
    measure,
    r_squared,
    roc_points,
    task_auc,
)

scored = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: len({positive for _, positive in rows}) == 2
)


@given(scored)
def test_auc_and_roc_agree_with_scikit_learn_ties_included(rows: list[tuple[int, bool]]) -> None:
    scores = np.array([score / 9 for score, _ in rows])
    positive = np.array([flag for _, flag in rows])
    assert auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    ours = roc_points(scores, positive)
    theirs = roc_curve(positive, scores, drop_intermediate=False)
    np.testing.assert_allclose(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1])


def test_multiclass_agrees_with_scikit_learn() -> None:
    generator = np.random.default_rng(3)
    probabilities = generator.dirichlet(np.ones(5), 83)
    labels = generator.integers(5, size=83)
    expected = roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert task_auc(probabilities, labels) == pytest.approx(expected)
    called = probabilities.argmax(axis=1)
    np.testing.assert_array_equal(confusion(called, labels, 5), confusion_matrix(labels, called))
    assert accuracy(probabilities, labels) == pytest.approx(np.trace(confusion(called, labels, 5)) / 83)


def test_a_class_that_is_absent_is_left_out_of_the_mean() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    assert task_auc(probabilities, np.array([0, 1, 1])) == pytest.approx(1.0)
    called = probabilities.argmax(axis=1)
    assert confusion(called, np.array([0, 1, 1]), 3).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_a_perfect_and_an_inverted_score() -> None:
    positive = np.array([False, True, True])
    assert auc(np.array([0.1, 0.4, 0.5]), positive) == 1.0
    assert auc(np.array([0.6, 0.4, 0.5]), positive) == 0.0
    assert np.isnan(auc(np.array([0.6, 0.4]), np.array([True, True])))


def _task(kind: str, **fields: object) -> TaskConfig:
    return TaskConfig.model_validate({"name": "t", "column": "a", "kind": kind, **fields})


def test_multilabel_agrees_with_scikit_learn_and_leaves_constant_labels_out() -> None:
    generator = np.random.default_rng(3)
    p, y = generator.random((41, 3)), generator.integers(0, 2, (41, 3)).astype(float)
    y[:, 1] = 1
    y[7] = np.nan
    known = np.arange(41) != 7
    area, exact = measure(_task("multilabel", classes=["x", "y", "z"]), p, y)
    assert area == pytest.approx(np.mean([roc_auc_score(y[known, k], p[known, k]) for k in (0, 2)]))
    assert exact == pytest.approx(accuracy_score(y[known].astype(int), (p[known] >= 0.5).astype(int)))


def test_regression_agrees_with_scikit_learn() -> None:
    generator = np.random.default_rng(4)
    y = generator.normal(size=23)
    p = y + generator.normal(size=23)
    r2, mae = measure(_task("regression"), p[:, None], np.append(y[:-1], np.nan))
    assert r2 == pytest.approx(r2_score(y[:-1], p[:-1]))
    assert mae == pytest.approx(np.abs(p - y)[:-1].mean())
    for value in (1.0, 0.1, 2.7):  # the mean of 23 times 0.1 is not 0.1
        assert np.isnan(r_squared(p, np.full(23, value)))


outcomes = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 4)), min_size=2, max_size=20)


@given(outcomes)
def test_concordance_is_the_share_of_ordered_pairs(rows: list[tuple[int, bool, int]]) -> None:
    pairs = [0.5 if p == q else float(p < q) for t, event, p in rows for u, _, q in rows if event and t < u]
    found = concordance(
        np.array([p for _, _, p in rows], float), np.array([t for t, _, _ in rows]), np.array([e for _, e, _ in rows])
    )
    assert found == pytest.approx(np.mean(pairs) if pairs else np.nan, nan_ok=True)


def test_expected_time_is_the_area_under_the_survival_curve() -> None:
    times = expected_time(np.array([[1.0, 1.0], [0.5, 0.0], [0.0, 0.0]]), (6, 10))
    assert times.tolist() == [10.0, 4.5 + 1.0, 3.0]
    task = _task("survival", event_column="e", bins=[6, 10])
    truth = np.array([[9.0, 1.0], [np.nan, np.nan], [2.0, 1.0]])
    assert measure(task, np.array([[1.0, 1.0], [0.5, 0.0], [0.0, 0.0]]), truth) == (1.0,)


@pytest.mark.parametrize("kind", ["binary", "multilabel", "regression", "survival"])
def test_no_label_at_all_measures_nothing(kind: str) -> None:
    task = _task(kind, **({"event_column": "e", "bins": [1.0, 2.0]} if kind == "survival" else {}))
    wide = kind in ("multilabel", "survival")
    found = measure(task, np.zeros((3, 2)), np.full((3, 2) if wide else 3, np.nan))
    assert len(found) == len(MEASURES[kind])
    assert np.isnan(found).all()
