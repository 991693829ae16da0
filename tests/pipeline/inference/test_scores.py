"""All measures against scikit-learn, scipy and their definitions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import spearmanr
from sklearn import metrics as sk

from pipeline.config.data import TaskConfig
from pipeline.inference.metrics import MEASURES, Floats, measure
from pipeline.inference.operating import reliability
from pipeline.inference.scores import as_wrong, calibrations, dynamic_auc, scores, title, with_failures


def _task(kind: str, **fields: object) -> TaskConfig:
    return TaskConfig.model_validate({"name": "t", "column": "a", "kind": kind, **fields})


def test_of_two_classes() -> None:
    generator = np.random.default_rng(1)
    truth = generator.integers(0, 2, 47).astype(float)
    positive = np.clip(0.3 * truth + generator.random(47) * 0.6, 0, 1)
    values = np.stack([1 - positive, positive], axis=1)
    truth_with_gap, with_gap = np.append(truth, np.nan), np.append(values, [[0.5, 0.5]], axis=0)
    found = scores(_task("binary"), with_gap, truth_with_gap, threshold=0.4)
    assert found["auc"] == pytest.approx(sk.roc_auc_score(truth, positive))
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(truth, positive))
    assert found["brier"] == pytest.approx(sk.brier_score_loss(truth, positive))
    assert found["log_loss"] == pytest.approx(sk.log_loss(truth, positive))
    assert found["f1"] == pytest.approx(sk.f1_score(truth, positive > 0.5))
    assert found["kappa"] == pytest.approx(sk.cohen_kappa_score(truth, positive > 0.5))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(truth, positive > 0.5))
    assert found["sensitivity"] == pytest.approx(sk.recall_score(truth, positive >= 0.4))
    assert found["specificity"] == pytest.approx(sk.recall_score(1 - truth, positive < 0.4))
    assert "sensitivity" not in scores(_task("binary"), values, truth)
    assert 0 < found["calibration_error"] < 0.6


def test_of_several_classes() -> None:
    generator = np.random.default_rng(2)
    truth = generator.integers(0, 3, 61).astype(float)  # of four: none has the last one
    values = generator.dirichlet([1, 1, 1, 1], 61)
    values[np.arange(61), truth.astype(int)] += 0.4
    values /= values.sum(axis=1, keepdims=True)
    task, called = _task("multiclass", classes=["g1", "g2", "g3", "g4"]), values.argmax(axis=1)
    found = scores(task, values, truth)
    expected = sk.cohen_kappa_score(truth, called, labels=[0, 1, 2, 3], weights="quadratic")
    assert found["kappa_quadratic"] == pytest.approx(expected)
    for k in range(3):
        assert found[f"auc_of_g{k + 1}"] == pytest.approx(sk.roc_auc_score(truth == k, values[:, k]))
    assert "auc_of_g4" not in found
    assert found["average_precision"] == pytest.approx(
        np.mean([sk.average_precision_score(truth == k, values[:, k]) for k in range(3)])
    )
    assert found["brier"] == pytest.approx(
        np.mean([np.sum((p - np.eye(4)[int(y)]) ** 2) for p, y in zip(values, truth, strict=True)])
    )
    assert found["log_loss"] == pytest.approx(sk.log_loss(truth, values, labels=[0, 1, 2, 3]))


def test_of_labels_numbers_and_one_class_alone() -> None:
    generator = np.random.default_rng(3)
    held = generator.integers(0, 2, (31, 2)).astype(float)
    found = scores(_task("multilabel", classes=["x", "y"]), generator.random((31, 2)), held)
    assert {"auc", "exact_match", "auc_of_x", "auc_of_y", "average_precision", "f1", "brier"} <= found.keys()
    true, predicted = generator.random(19), generator.random(19)
    numbers = scores(_task("regression"), predicted[:, None], true)
    assert numbers["spearman"] == pytest.approx(spearmanr(predicted, true).statistic)
    assert numbers["mae"] == pytest.approx(sk.mean_absolute_error(true, predicted))
    alone = scores(_task("binary"), np.array([[0.2, 0.8], [0.4, 0.6]]), np.ones(2))
    assert "auc" not in alone
    assert alone["accuracy"] == 1
    assert scores(_task("binary"), np.full((2, 2), 0.5), np.full(2, np.nan)) == {}


def _slow_dynamic_auc(risk: Floats, time: Floats, event: npt.NDArray[np.bool_], horizon: float) -> float:
    """Uno et al. (2007), pair by pair."""

    def kept(before: float) -> float:
        product = 1.0
        for step in sorted({t for t, e in zip(time, event, strict=True) if not e and t < before}):
            gone = sum(1 for t, e in zip(time, event, strict=True) if t == step and not e)
            at_risk = sum(1 for t, e in zip(time, event, strict=True) if t > step or (t == step and not e))
            product *= 1 - gone / at_risk
        return product

    won = whole = 0.0
    for i in range(len(time)):
        if not (time[i] <= horizon and event[i]):
            continue
        weight = 1 / kept(time[i])
        for j in range(len(time)):
            if time[j] > horizon:
                won += weight * (1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0)
                whole += weight
    return won / whole if whole else float("nan")


@pytest.mark.parametrize("seed", range(6))
def test_time_dependent_auc_is_its_definition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    time, event = generator.integers(1, 9, 29).astype(float), generator.random(29) < 0.6
    risk = generator.integers(0, 5, 29).astype(float)
    for horizon in (1.0, 4.0, 7.5):
        expected = _slow_dynamic_auc(risk, time, event, horizon)
        assert dynamic_auc(risk, time, event, horizon) == pytest.approx(expected, nan_ok=True)
    task = _task("survival", event_column="e", bins=[4.0, 8.0])
    survival = np.sort(generator.random((29, 2)), axis=1)[:, ::-1]
    found = scores(task, survival, np.stack([time, event], axis=1))
    assert found["auc_at_4"] == pytest.approx(_slow_dynamic_auc(1 - survival[:, 0], time, event, 4.0))
    assert np.isnan(dynamic_auc(risk, time, np.zeros(29, bool), 4.0))


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_failures_count_as_wrong_as_they_can_be(kind: str) -> None:
    """No prediction that they could have had is worse."""
    generator = np.random.default_rng(4)
    fields = {} if kind == "binary" else {"classes": ["a", "b", "c"]}
    task = _task(kind, **fields)
    width = len(task.classes)
    truth = (
        generator.integers(0, 2, (17, 3)).astype(float)
        if kind == "multilabel"
        else generator.integers(0, width, 17).astype(float)
    )
    values = generator.dirichlet(np.ones(width), 17)
    values[[2, 5, 11]] = np.nan
    worst = with_failures(task, values, truth)
    assert list(worst) == list(MEASURES[kind])
    for _ in range(50):
        filled = values.copy()
        filled[[2, 5, 11]] = generator.dirichlet(np.ones(width), 3)
        for name, found in zip(MEASURES[kind], measure(task, filled, truth), strict=True):
            assert worst[name] <= found + 1e-12
    assert with_failures(_task("regression"), np.array([[np.nan]]), np.ones(1)) == {}
    assert as_wrong(_task("regression"), np.ones(1)) is None


def test_a_class_called_low_takes_no_interval_s_name_and_each_has_a_title() -> None:
    """`auc_low` is the lower end of an AUC."""
    generator = np.random.default_rng(5)
    task = _task("multiclass", classes=["low", "high", "3+4"])
    found = scores(task, generator.dirichlet([1, 1, 1], 43), generator.integers(0, 3, 43).astype(float))
    assert {"auc_of_low", "average_precision_of_high"} <= found.keys()
    assert not {"auc_low", "auc_high"} & found.keys()
    assert title("auc_of_3+4") == "AUC, 3+4"
    assert title("auc_at_6") == "AUC at 6"
    assert all(title(name) for name in found)


def test_calibration_is_of_each_class_and_of_labelled_slides() -> None:
    generator = np.random.default_rng(6)
    p = generator.dirichlet([1, 1, 1], 37)
    y = np.append(generator.integers(0, 3, 36).astype(float), np.nan)
    found = calibrations(_task("multiclass", classes=["a", "b", "c"]), p, y)
    assert list(found) == ["a", "b", "c"]
    assert found["b"].error == pytest.approx(reliability(p[:36, 1], y[:36] == 1).error)
    assert sum(found["c"].counts) == 36
    assert list(calibrations(_task("binary"), p[:, :2], np.minimum(y, 1))) == ["1"]
    assert calibrations(_task("regression"), p[:, :1], y) == {}
    assert calibrations(_task("binary"), p[:2, :2], np.full(2, np.nan)) == {}
