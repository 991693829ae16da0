from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.cohort.labels import Label
from pipeline.config.data import TaskConfig
from pipeline.errors import PipelineError, SlideError, StageError, StorageError
from pipeline.inference.prediction import BagPrediction
from pipeline.training.ranks import Ranks
from pipeline.training.validation import Outputs, check_finite, look, predict_together

TUMOUR = TaskConfig(name="tumour", column="t", class_weights=(1.0, 9.0))
AGE = TaskConfig(name="age", column="a", kind="regression", mean=50, std=10)


def _found(logit: float, age: float) -> Outputs:
    p = 1 / (1 + math.exp(-logit))
    return Outputs(
        values={"tumour": np.array([1 - p, p]), "age": np.array([age])},
        logits={"tumour": np.array([logit]), "age": np.array([(age - 50) / 10])},
    )


FOUND = [_found(2.0, 60.0), _found(-1.0, 40.0), _found(0.5, 55.0)]


def _labels(*pairs: tuple[Label | None, Label | None]) -> list[dict[str, Label | None]]:
    return [{"tumour": tumour, "age": age} for tumour, age in pairs]


def test_a_look_has_every_measure_their_mean_and_the_loss() -> None:
    found = look([TUMOUR, AGE], _labels(("1", 65.0), ("0", 40.0), ("1", None)), FOUND)
    binary = np.mean([math.log1p(math.exp(-2)), math.log1p(math.exp(-1)), math.log1p(math.exp(-0.5))])
    assert found["val_loss"] == pytest.approx((binary + (0.5**2 + 0) / 2) / 2)
    assert found["val_auc_tumour"] == 1.0
    assert 1 / (1 + math.e) < found["val_threshold_tumour"] < 1 / (1 + math.exp(-0.5))  # between negative and positive
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


def test_a_loss_that_is_not_finite_is_refused() -> None:
    check_finite(FOUND, {"val_loss": 0.5}, ["a", "b", "c"], "after step 3")
    check_finite(FOUND, {}, ["a", "b", "c"], "after step 3")
    with pytest.raises(StageError, match="the validation loss became inf after step 3"):
        check_finite(FOUND, {"val_loss": math.inf}, ["a", "b", "c"], "after step 3")
    with pytest.raises(StageError, match="the logits of the validation slide c are not finite after step 3"):
        check_finite([*FOUND[:2], _found(math.nan, 1.0)], {}, ["a", "b", "c"], "after step 3")


class Together:
    """Ranks that are threads of one process; who comes to a sum waits for the others."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._lock = threading.Lock()
        self._parts: list[Tensor] = []
        self.ranks = [Ranks(rank, world_size, self._sum) for rank in range(world_size)]

    def _sum(self, tensor: Tensor) -> None:
        with self._lock:
            self._parts.append(tensor.clone())
        self._barrier.wait()
        total = torch.stack(self._parts).sum(dim=0).to(tensor.dtype)
        if self._barrier.wait() == 0:
            self._parts = []
        self._barrier.wait()
        tensor.copy_(total)


Stops = dict[int, Exception]


def _predicted(index: int, stops: Stops, taken: list[int]) -> BagPrediction:
    if index in stops:
        raise stops[index]
    taken.append(index)
    one = _found(index / 7, 40.0 + index)
    return BagPrediction(one.values, one.logits, np.ones(9, np.float32), np.zeros(1, np.int64))


def _everywhere(
    sizes: Sequence[int], world_size: int, stops: Stops
) -> tuple[list[list[Outputs] | Exception], list[list[int]]]:
    """What every rank gets, or raises; and which slides it took."""
    taken: list[list[int]] = [[] for _ in range(world_size)]

    def work(ranks: Ranks) -> list[Outputs] | Exception:
        def predict(index: int) -> BagPrediction:
            return _predicted(index, stops, taken[ranks.rank])

        try:
            return predict_together(predict, sizes, ranks, torch.device("cpu"))
        except (PipelineError, RuntimeError, KeyError) as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, Together(world_size).ranks)), taken


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=9), st.integers(1, 4))
def test_any_number_of_ranks_predicts_what_one_does(sizes: list[int], world_size: int) -> None:
    alone = [_predicted(index, {}, []) for index in range(len(sizes))]
    found, taken = _everywhere(sizes, world_size, {})
    assert sorted(index for hand in taken for index in hand) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in hand) for hand in taken]
    assert max(loads) - min(loads) <= max(sizes)
    for rank in found:
        assert isinstance(rank, list)
        for one, other in zip(rank, alone, strict=True):
            assert all(np.array_equal(one.values[task], other.values[task]) for task in other.values)
            assert all(np.array_equal(one.logits[task], other.logits[task]) for task in other.logits)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("index", [0, 4])
def test_what_stops_one_rank_stops_all_with_the_same_error(index: int) -> None:
    for error in (StorageError("s3://b/x is away"), SlideError("bad-tiles", "row 3")):
        found, _ = _everywhere([9, 8, 7, 3, 1], 3, {index: error})
        assert [(type(one), str(one)) for one in found] == [(type(error), str(error))] * 3
    other, _ = _everywhere([9, 8, 7, 3, 1], 3, {index: KeyError("x")})
    assert sorted(type(one).__name__ for one in other) == ["KeyError", "RuntimeError", "RuntimeError"]
    assert any("failed in the validation: KeyError('x')" in str(one) for one in other)
