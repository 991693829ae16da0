from __future__ import annotations

import pytest

from pipeline.config.model import TrainConfig
from pipeline.errors import StageError
from pipeline.training.stopping import Watch


def _watched(settings: TrainConfig, values: list[float]) -> list[tuple[int, int, bool]]:
    """After each look: the best epoch, looks since, and whether it is over; through the metrics, as a resume does."""
    found: list[tuple[int, int, bool]] = []
    metrics: dict[str, float] = {}
    for epoch, value in enumerate(values, start=1):
        watch = Watch.of(metrics).after({f"val_{settings.monitor}": value}, epoch, settings)
        metrics = watch.metrics
        assert Watch.of(metrics) == watch
        found.append((watch.best_epoch, watch.waited, watch.is_over(settings)))
    return found


def test_patience_counts_looks_without_a_better_one() -> None:
    found = _watched(TrainConfig(patience=2), [0.9, 0.7, 0.7, 0.6, 0.8, 0.61])
    assert found == [(1, 0, False), (2, 0, False), (2, 1, False), (4, 0, False), (4, 1, False), (4, 2, True)]


def test_a_score_is_better_when_higher_and_without_patience_nothing_ends() -> None:
    found = _watched(TrainConfig(keep_best=True, monitor="score"), [0.5, 0.8, 0.1, 0.8])
    assert found == [(1, 0, False), (2, 0, False), (2, 1, False), (2, 2, False)]


def test_no_look_yet() -> None:
    assert Watch.of({}) == Watch()
    assert Watch().metrics == {}


def test_a_split_that_cannot_give_the_metric_is_named() -> None:
    with pytest.raises(StageError, match=r"no val_score.*label slides of every class in the val split"):
        Watch().after({"val_loss": 1.0}, 1, TrainConfig(patience=1, monitor="score"))
