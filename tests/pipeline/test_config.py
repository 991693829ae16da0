from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import Config, TilingConfig, fingerprint

MINIMAL: dict[str, Any] = {"name": "x", "cohort": {"uri": "c.csv"}, "tasks": [{"name": "t", "column": "label"}]}


def _changed(**sections: Any) -> Config:
    return Config.model_validate({**MINIMAL, **sections})


def test_execution_fields_do_not_enter_fingerprints() -> None:
    plain = TilingConfig()
    assert plain.fingerprint() == TilingConfig(cpus=4, max_bad_slides=7).fingerprint()
    base = fingerprint(_changed().recipe())
    execution = {"storage": {"root": "elsewhere"}, "tracking": {"uri": "http://x"}, "cluster": {"gpus_per_worker": 1}}
    for same in ({section: fields} for section, fields in execution.items()):
        assert fingerprint(_changed(**same).recipe()) == base


@pytest.mark.parametrize(
    "section",
    [{"seed": 1}, {"train": {"lr": 1e-4}}, {"model": {"select": {"memory": 3}}}, {"cluster": {"workers": 2}}],
)
def test_what_determines_the_model_enters_its_fingerprint(section: dict[str, Any]) -> None:
    assert fingerprint(_changed(**section).recipe()) != fingerprint(_changed().recipe())


@pytest.mark.parametrize("field", [{"patch_px": 128}, {"mpp": 1.0}, {"jpeg_quality": 80}, {"min_tissue": 0.5}])
def test_every_tiling_field_enters_the_store_key(field: dict[str, Any]) -> None:
    assert TilingConfig(**field).fingerprint() != TilingConfig().fingerprint()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"tiling": {"patch_px": 64, "overlap_px": 64}}, "must be smaller"),
        ({"train": {"epochs": 3, "warmup_epochs": 5}}, "exceeds epochs"),
        ({"cohort": {"uri": "c", "split": {"train": 0.9}}}, "sum to 1"),
        ({"tasks": [{"name": "t", "column": "a", "classes": ["0", "1", "2"]}]}, "2 classes"),
        ({"tasks": [{"name": "t", "column": "a"}, {"name": "t", "column": "b"}]}, "names must differ"),
        ({"train": {"lr": float("nan")}}, "greater than 0|finite"),
    ],
)
def test_impossible_combinations_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        _changed(**section)


def test_fingerprint_ignores_key_order_and_refuses_nan() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"a": float("nan")})
