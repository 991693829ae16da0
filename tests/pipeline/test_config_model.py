from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config_model import TrainConfig


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"epochs": 3, "warmup_epochs": 5}, "exceeds epochs"),
        ({"epochs": 6, "explore_epochs": 6}, "leaves no epoch"),
        ({"lr": float("nan")}, "greater than 0|finite"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainConfig(**fields)
