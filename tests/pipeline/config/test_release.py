from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.release import GateConfig, NotifyConfig, ResourcesRule, RetrainConfig, seconds


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("1.5h", 5400), ("8d", 691_200), ("2w", 1_209_600), ("3m", 180)]
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value
    assert RetrainConfig(expect_new_within=text).expected_s == value


@pytest.mark.parametrize("text", ["8", "d", "8 days", "-1d", "8D"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValidationError, match="is no duration; write a number and s, m, h, d or w, as in 8d"):
        RetrainConfig(expect_new_within=text)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "no rule is set, and no model is promoted unseen"),
        ({"first": "floors", "approval": True}, "first=floors without floors would promote the first model unseen"),
    ],
)
def test_nothing_is_promoted_unseen(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        GateConfig.model_validate(given)


def test_other_contradictions() -> None:
    with pytest.raises(ValidationError, match="limits nothing"):
        ResourcesRule()
    with pytest.raises(ValidationError, match="url"):
        NotifyConfig(url="ftp://host/x")
    assert RetrainConfig.model_validate({"refresh_test": True}).refresh_test == 1
