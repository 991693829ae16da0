from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.config_data import TaskConfig
from pipeline.inference import BagPrediction
from pipeline.labels import Label
from pipeline.validation import look

TUMOUR = TaskConfig(name="tumour", column="t", class_weights=(1.0, 9.0))
AGE = TaskConfig(name="age", column="a", kind="regression", mean=50, std=10)


def _found(logit: float, age: float) -> BagPrediction:
    p = 1 / (1 + math.exp(-logit))
    return BagPrediction(
        values={"tumour": np.array([1 - p, p]), "age": np.array([age])},
        logits={"tumour": np.array([logit]), "age": np.array([(age - 50) / 10])},
        attention=np.ones(1, np.float32),
        selected=np.zeros(1, np.int64),
    )


FOUND = [_found(2.0, 60.0), _found(-1.0, 40.0), _found(0.5, 55.0)]


def _labels(*pairs: tuple[Label | None, Label | None]) -> list[dict[str, Label | None]]:
    return [{"tumour": tumour, "age": age} for tumour, age in pairs]


def test_a_look_has_every_measure_their_mean_and_the_loss() -> None:
    found = look([TUMOUR, AGE], _labels(("1", 65.0), ("0", 40.0), ("1", None)), FOUND)
    binary = np.mean([math.log1p(math.exp(-2)), math.log1p(math.exp(-1)), math.log1p(math.exp(-0.5))])
    assert found["val_loss"] == pytest.approx((binary + (0.5**2 + 0) / 2) / 2)
    assert found["val_auc_tumour"] == 1.0
    assert found["val_r2_age"] == pytest.approx(1 - 25 / 312.5)
    assert found["val_mae_age"] == pytest.approx(2.5)
    assert found["val_score"] == pytest.approx((1.0 + found["val_r2_age"]) / 2)


def test_what_the_labels_cannot_give_is_absent() -> None:
    one_class = look([TUMOUR], _labels(("1", None), ("1", None), (None, None)), FOUND)
    assert set(one_class) == {"val_accuracy_tumour", "val_loss"}
    assert look([TUMOUR], _labels((None, None), (None, None), (None, None)), FOUND) == {}
    half = look([TUMOUR, AGE], _labels(("1", None), ("0", None), (None, None)), FOUND)
    alone = look([TUMOUR], _labels(("1", None), ("0", None), (None, None)), FOUND)
    assert half["val_loss"] == alone["val_loss"]  # a task without labels does not halve it
    assert "val_score" not in half
