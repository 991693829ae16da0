from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.data import CohortConfig, TaskConfig, TilingConfig


@pytest.mark.parametrize(
    "field",
    [
        {"patch_px": 128},
        {"mpp": 1.0},
        {"jpeg_quality": 80},
        {"min_tissue": 0.5},
        {"min_sharpness": 0.0},
        {"context_mpp": 2.0},
    ],
)
def test_every_tiling_field_enters_the_store_key(field: dict[str, Any]) -> None:
    assert TilingConfig(**field).fingerprint() != TilingConfig().fingerprint()


def test_stores_of_before_keep_their_key_where_nothing_new_is_set() -> None:
    """The fingerprints of schema 6 without the fields that came later; and what a commit says of the spec."""
    other = TilingConfig(patch_px=224, mpp=1.0, tissue="none", edge="pad")
    assert (TilingConfig().fingerprint(), other.fingerprint()) == ("a636d6c7da4082a4", "c1d87da9e3716030")
    assert TilingConfig(min_sharpness=0).fingerprint() != TilingConfig(min_sharpness=1).fingerprint()
    measured = TilingConfig(min_sharpness=0).identity()
    assert measured == {**TilingConfig().identity(), "min_sharpness": 0}


def test_a_network_for_tissue_is_asked_for_and_named() -> None:
    network = {"uri": "a.pt", "sha256": "0" * 64, "mpp": 8.0, "classes": ["glass", "tissue"], "tissue": ["tissue"]}
    for given in ({"tissue": "model"}, {"tissue_model": network}, {"tissue": "none", "tissue_model": network}):
        with pytest.raises(ValidationError, match="tissue=model and tissue_model go together"):
            TilingConfig.model_validate(given)
    with pytest.raises(ValidationError, match="tissue=model needs mpp: where level 0 is taken as it is"):
        TilingConfig.model_validate({"tissue": "model", "tissue_model": network, "mpp": None})
    with pytest.raises(ValidationError, match="give the 64 digits that `sha256sum` prints"):
        TilingConfig.model_validate({"tissue": "model", "tissue_model": {**network, "sha256": ""}})
    known = TilingConfig.model_validate({"tissue": "model", "tissue_model": network}).identity()["tissue_model"]
    assert "uri" not in known
    assert known["sha256"] == "0" * 64


def test_an_overlap_is_smaller_than_the_patch() -> None:
    with pytest.raises(ValidationError, match="must be smaller"):
        TilingConfig(patch_px=64, overlap_px=64)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mpp": None, "context_mpp": 2.0}, "set tiling.mpp"),
        ({"context_mpp": 0.9}, "must be 1 to 8, twice to 16 times mpp=0.5"),
        ({"mpp": 1.0, "context_mpp": 17.0}, "must be 2 to 16"),
        ({"context_mpp": 0}, "greater than 0"),
    ],
)
def test_surroundings_are_coarser_than_patches(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TilingConfig(**fields)
    assert TilingConfig(context_mpp=1.0).context_mpp == 1.0
    assert TilingConfig(context_mpp=8.0).identity()["context_mpp"] == 8.0


def test_the_shares_of_the_split_sum_to_one() -> None:
    with pytest.raises(ValidationError, match="sum to 1"):
        CohortConfig.model_validate({"uri": "c", "split": {"train": 0.9}})


def test_a_binary_task_has_two_classes() -> None:
    with pytest.raises(ValidationError, match="2 classes"):
        TaskConfig(name="t", column="a", classes=("0", "1", "2"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"classes": ("0", "0")}, "name one value twice"),
        ({"kind": "multiclass", "classes": ("a",)}, "at least 2 classes"),
        ({"kind": "multilabel", "classes": ("a;b",)}, "without ';'"),
        ({"kind": "multilabel", "classes": ("a", "-")}, "'-' means none"),
        ({"kind": "regression", "classes": ("0", "1")}, "a regression task has no classes; remove them"),
        ({"kind": "regression", "class_weights": "balanced"}, "only binary and multiclass tasks take them"),
        ({"class_weights": (1, 2, 3)}, "3 weights for 2 classes"),
        ({"class_weights": (1, 0)}, "greater than 0"),
        ({"kind": "survival"}, "needs event_column and bins"),
        ({"kind": "survival", "event_column": "e", "bins": (6, 6)}, "must ascend"),
        ({"event_column": "e"}, "belong to survival tasks, not to binary; remove them"),
        ({"std": 2.0}, "scale the values of a regression task"),
    ],
)
def test_what_a_kind_of_task_cannot_have(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TaskConfig(name="t", column="a", **fields)


def test_outputs_and_columns_of_each_kind() -> None:
    survival = TaskConfig(name="t", column="a", kind="survival", event_column="e", bins=(6, 12.5))
    assert (survival.outputs, survival.columns, survival.classes) == (("6", "12.5"), ("a", "e"), ())
    regression = TaskConfig.model_validate_json(TaskConfig(name="t", column="a", kind="regression").model_dump_json())
    assert (regression.outputs, regression.columns) == (("value",), ("a",))
    assert TaskConfig(name="t", column="a", kind="multilabel", classes=("x", "y")).outputs == ("x", "y")
