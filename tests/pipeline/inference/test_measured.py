"""One task's measures are those of their own modules, together."""

from __future__ import annotations

import numpy as np

from pipeline.config.data import TaskConfig
from pipeline.inference.intervals import task_intervals
from pipeline.inference.measured import measured
from pipeline.inference.metrics import MEASURES, measure
from pipeline.inference.resampling import draw_plan
from pipeline.inference.scores import scores
from pipeline.inference.weighted import resampled_measures


def test_value_interval_and_further_measures_are_of_the_same_slides() -> None:
    task, generator = TaskConfig(name="t", column="a"), np.random.default_rng(3)
    y = np.append(generator.integers(0, 2, 40).astype(float), np.nan)
    p = np.clip(0.3 * np.nan_to_num(y) + 0.6 * generator.random(41), 0, 1)
    values, patients = np.stack([1 - p, p], axis=1), [f"p{n // 2}" for n in range(41)]
    weights = draw_plan(patients, np.nan_to_num(y, nan=-1).astype(int).tolist(), 300, 1).weights(patients)
    found = measured(task, values, y, patients, weights, threshold=0.4)
    assert found.scores == scores(task, values, y, 0.4)
    assert list(found.measures) == list(MEASURES["binary"])
    whole = measure(task, values, y)
    assert tuple(one.value for one in found.measures.values()) == whole
    drawn = resampled_measures(task, values, y, weights)
    np.testing.assert_array_equal(found.resampled, drawn)
    assert list(found.measures.values()) == task_intervals(task, y, patients, whole, drawn)
    assert found.measures["auc"].low < found.measures["auc"].value < found.measures["auc"].high


def test_one_class_alone_has_no_auc_and_the_rest() -> None:
    task = TaskConfig(name="t", column="a")
    values, patients = np.tile([0.2, 0.8], (5, 1)), list("abcde")
    weights = draw_plan(patients, [1] * 5, 50, 1).weights(patients)
    found = measured(task, values, np.ones(5), patients, weights)
    assert np.isnan(found.measures["auc"].value)
    assert "auc" not in found.scores
    assert found.measures["accuracy"].value == 1
    assert found.measures["accuracy"].low < 1
