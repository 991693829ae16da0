from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config_data import CohortConfig, TaskConfig, TilingConfig


@pytest.mark.parametrize("field", [{"patch_px": 128}, {"mpp": 1.0}, {"jpeg_quality": 80}, {"min_tissue": 0.5}])
def test_every_tiling_field_enters_the_store_key(field: dict[str, Any]) -> None:
    assert TilingConfig(**field).fingerprint() != TilingConfig().fingerprint()


def test_an_overlap_is_smaller_than_the_patch() -> None:
    with pytest.raises(ValidationError, match="must be smaller"):
        TilingConfig(patch_px=64, overlap_px=64)


def test_the_shares_of_the_split_sum_to_one() -> None:
    with pytest.raises(ValidationError, match="sum to 1"):
        CohortConfig.model_validate({"uri": "c", "split": {"train": 0.9}})


def test_a_binary_task_has_two_classes() -> None:
    with pytest.raises(ValidationError, match="2 classes"):
        TaskConfig(name="t", column="a", classes=("0", "1", "2"))
