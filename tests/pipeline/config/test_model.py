from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.compose import load_config
from pipeline.config.model import ModelConfig, TrainConfig


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"epochs": 3, "warmup_epochs": 5}, "exceeds epochs"),
        ({"epochs": 6, "explore_epochs": 6}, "leaves no epoch"),
        ({"lr": float("nan")}, "greater than 0|finite"),
        ({"bounded": True}, "bounded: true does not go with norm: batch; choose bounded: false with norm: batch, or"),
        ({"norm": "frozen"}, "bounded: false does not go with norm: frozen"),
        ({"norm": "group"}, "bounded: false does not go with norm: group"),
        ({"epochs": 3, "warmup_epochs": 0, "freeze_encoder_epochs": 3}, "set freeze_encoder: true"),
        ({"freeze_encoder": True, "encoder_lr": 1e-4}, "nothing to do; drop them"),
        ({"stain_jitter": 0.1, "augment": False}, "augment is false"),
        ({"reselect_every": 2, "source": "stream"}, "cuts every patch of a slide anew; set reselect_every=1 or source"),
        ({"reselect_every": 1001}, "less than or equal"),
        ({"score_batch": 12}, "multiple of 8"),
        ({"score_batch": 0}, "greater than or equal to 8"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainConfig(**fields)


def test_how_often_slides_are_read_follows_from_their_turns() -> None:
    assert TrainConfig(epochs=20).readings == 20
    assert TrainConfig(epochs=20, explore_epochs=3, reselect_every=4).readings == 3 + 1 + 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"encoder": {"channels": 1}}, "mean has 3 values and std 3, for patches of 1 channels"),
        ({"mean": (0.5,)}, "mean has 1 values and std 3, for patches of 3 channels"),
        ({"std": (1, 1, 0)}, "greater than 0"),
        ({"encoder": {"name": "vgg16"}}, "should match pattern"),
        ({"encoder": {"name": "features"}}, "needs the width of the stored features"),
        ({"encoder": {"features": 512}}, "belong to name: features, not to resnet18"),
        ({"aggregator": {"pool": "gated"}}, "no attention that could select; set select.mode to random or every"),
    ],
)
def test_networks_that_cannot_be_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelConfig(**fields)


def test_the_best_is_kept_where_asked_for() -> None:
    assert [TrainConfig(**f).keeps_best for f in ({}, {"keep_best": True}, {"patience": 3})] == [False, True, True]
    assert TrainConfig(bounded=True, norm="group").norm == "group"


CONF = Path(__file__).resolve().parents[3] / "conf"


@pytest.mark.parametrize(
    "choice", sorted(f"{p.parent.name}={p.stem}" for group in ("model", "train") for p in (CONF / group).glob("*.yaml"))
)
def test_every_group_file_is_a_config(choice: str) -> None:
    digits = ["cohort=megapixel_mnist", "cohort.megapixel_mnist.folder=mnist", "model=megapixel_mnist"]
    images = [*digits, "tiling=image", "train.augment=false"] if "megapixel" in choice else []
    stored = ["model.encoder.features=64", "embed.encoder.name=resnet50", "train.augment=false"]
    features = stored if choice == "model=features" else []
    load_config("default", ["cohort.uri=c.csv", "storage.root=/r", choice, *images, *features])
