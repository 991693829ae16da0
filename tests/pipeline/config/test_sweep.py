from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.sweep import SweepConfig

PLAIN: dict[str, Any] = {"models": {"a": "models:/x@champion"}, "cohorts": {"own": "cohort.csv"}}


def test_a_cohort_that_is_only_a_place_is_all_of_its_slides() -> None:
    found = SweepConfig.model_validate(
        {**PLAIN, "cohorts": {"own": "a.csv", "other": {"uri": "b.csv", "split": "test"}}}
    )
    assert [(one.uri, one.split) for one in found.cohorts.values()] == [("a.csv", None), ("b.csv", "test")]


def test_places_become_absolute_and_versions_stay() -> None:
    models = {"a": "models:/x/3", "b": "folder", "c": "last"}
    found = SweepConfig.model_validate({**PLAIN, "models": models}).with_places(lambda uri: f"/abs/{uri}")
    assert found.models == {"a": "models:/x/3", "b": "/abs/folder", "c": "last"}
    assert found.cohorts["own"].uri == "/abs/cohort.csv"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {}}, "names no training"),
        ({"train": {"grid": {"train.lr": []}}}, "train.grid"),
        ({"train": {"grid": {"tiling.mpp": [1.0]}}}, "tiling.mpp: only settings of model and train"),
        ({"grid": {"memory": []}}, "grid.memory"),
        ({"grid": {"memory": [4, 12, 4]}}, r"memory: \[4, 12, 4\] asks for one cell twice"),
        ({"grid": {"seed": [0, 1]}}, "grid.seed has no effect"),
        ({"grid": {"mode": ["best"]}}, "grid.mode"),
        ({"models": {"a b": "x"}}, "models"),
    ],
)
def test_what_makes_no_sweep_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SweepConfig.model_validate({**PLAIN, **change})
