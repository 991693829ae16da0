"""The measures of many resamples against those of each one, whose slides are copied."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config.data import TaskConfig
from pipeline.inference.metrics import MEASURES, Floats, measure
from pipeline.inference.weighted import Counts, resampled_measures


def _task(kind: str, **fields: object) -> TaskConfig:
    return TaskConfig.model_validate({"name": "t", "column": "a", "kind": kind, **fields})


def _sample(kind: str, n: int) -> tuple[TaskConfig, Floats, Floats]:
    """Tied scores, some labels missing."""
    generator = np.random.default_rng(n)
    grid = generator.integers(0, 7, (n, 3)) / 7
    truth: Floats = generator.integers(0, 3, n).astype(np.float64)
    truth[4] = np.nan
    match kind:
        case "binary":
            return _task(kind), np.stack([1 - grid[:, 0], grid[:, 0]], axis=1), np.minimum(truth, 1)
        case "multiclass":
            return _task(kind, classes=["a", "b", "c"]), grid / np.maximum(1e-9, grid.sum(axis=1, keepdims=True)), truth
        case "multilabel":
            held = generator.integers(0, 2, (n, 3)).astype(np.float64)
            held[2] = np.nan
            return _task(kind, classes=["a", "b", "c"]), grid, held
        case "regression":
            return _task(kind), grid[:, :1], truth
        case _:
            outcomes = np.stack([generator.integers(1, 9, n), generator.integers(0, 2, n)], axis=1).astype(np.float64)
            outcomes[5] = np.nan
            return _task(kind, event_column="e", bins=[3, 6, 9]), np.sort(grid, axis=1)[:, ::-1], outcomes


@pytest.mark.parametrize("kind", list(MEASURES))
@pytest.mark.parametrize("n", [7, 53])
def test_a_resample_is_measured_as_its_slides_would_be(kind: str, n: int) -> None:
    task, values, truth = _sample(kind, n)
    weights: Counts = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), 41).astype(np.uint8)
    weights[0] = 0  # no slide at all
    weights[1] = np.arange(n) == 0  # one slide: no pair, no other class
    found = resampled_measures(task, values, truth, weights)
    assert found.shape == (41, len(MEASURES[kind]))
    for row, counts in zip(found, weights, strict=True):
        copied = np.repeat(np.arange(n), counts)
        np.testing.assert_allclose(row, measure(task, values[copied], truth[copied]), rtol=1e-12, atol=1e-12)
    assert not np.isnan(found[2:]).all()


def test_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in MEASURES:
        task, values, truth = _sample(kind, 53)
        weights = np.random.default_rng(2).integers(0, 3, (29, 53)).astype(np.uint8)
        whole = resampled_measures(task, values, truth, weights)
        monkeypatch.setattr("pipeline.inference.weighted._CELLS", 101)
        np.testing.assert_allclose(resampled_measures(task, values, truth, weights), whole, rtol=1e-12)
        monkeypatch.undo()


def test_a_patient_may_be_drawn_more_often_than_a_byte_can_be_multiplied() -> None:
    """Products and sums of weights are not those of bytes."""
    task, values, truth = _sample("binary", 53)
    weights = np.full((1, 53), 200, np.uint8)
    np.testing.assert_allclose(resampled_measures(task, values, truth, weights)[0], measure(task, values, truth))


def test_no_label_measures_nothing() -> None:
    task, values, truth = _sample("regression", 7)
    assert np.isnan(resampled_measures(task, values, np.full_like(truth, np.nan), np.ones((3, 7), np.uint8))).all()
