from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.config.unused import UNUSED, unused
from pipeline.errors import ConfigError

CONF = Path(__file__).resolve().parents[3] / "conf"
MNIST = {"cohort": {"uri": "c", "megapixel_mnist": {"folder": "digits"}}}
BASELINE = {"model.select.mode": "random"}
TIMM = {"model.encoder.name": "timm:vit_small_patch16_224"}
FEATURES = {"model.encoder.name": "features", "model.encoder.features": 64, "embed.encoder.name": "resnet50"}

GIVEN = {"model.encoder.name": "features", "model.encoder.features": 64, "cohort.features": "folder"}

READ = {
    "": "name seed cohort.uri cohort.bag evaluate.split evaluate.bootstrap storage.root",
    "tracking": "uri experiment model",
    "cohort.demo": "slides seed",
    "cohort.megapixel_mnist": "folder train test width height strokes seed",
    "tiling": "patch_px mpp max_bad_slides",
    "tiling.tissue_model": "uri sha256 mpp classes tissue threshold outputs mean std tile overlap",
    "tasks": "name column kind classes class_weights event_column bins mean std",
    "embed": "mean std dtype compute_dtype batch",
    "embed.encoder": "name channels features dim weights",
    "model": "positions",
    "model.encoder": "name features dim",
    "model.aggregator": "pool",
    "model.select": "mode chunk context",
    "train": "source begins_with epochs batch_size balance_window micro_batch bounded norm lr encoder_lr "
    "freeze_encoder freeze_encoder_epochs weight_decay warmup_epochs sampling validate_every patience keep_best "
    "clip_norm augment stain_jitter compute_dtype threads folds fold",
    "sweep": "models resamples few allow_seen overlays workers models_gib shard_above",
    "sweep.cohorts": "uri split",
    "sweep.grid": "mode memory precision mpp seed",
    "sweep.train": "grid runs",
    "cluster": "address workers cpus_per_worker gpus_per_worker connect_timeout_s start_timeout_s max_failures "
    "wait_minutes checkpoint_minutes checkpoint_steps trainings",
    "gate": "approval first",
    "gate.floors": "measure bound task least action",
    "gate.no_worse": "margin level measure task least resamples action",
    "gate.strata": "columns measure bound task least few action",
    "gate.calibration": "most task action",
    "gate.resources": "seconds memory_gib action",
    "gate.drift": "alpha effect least action",
    "gate.lost": "patches slides action",
    "retrain": "start new_patients refresh_test expect_new_within",
    "notify": "url",
    "deploy": "address env patience_minutes package_mb command image namespace secrets service_account schedule "
    "time_zone queue head_cpus head_memory_gib worker_memory_gib tilers artifacts storage_class deadline_hours",
}
"""Fields that something reads in every valid config: a section's own checks refuse what they do not go with."""


def _given(changes: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {"name": "x", "cohort": {"uri": "c"}, "tasks": [{"name": "t", "column": "label"}]}
    for path, value in changes.items():
        *sections, name = path.split(".")
        place = tree
        for part in sections:
            place = place.setdefault(part, {})
        place[name] = value
    return tree


def _leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is None:
            yield prefix + name
        else:
            yield from _leaves(inner, f"{prefix}{name}.")


def test_every_field_is_either_read_or_said_to_be_unused_somewhere() -> None:
    """A new field is written down here, or, where some config leaves it without effect, in `UNUSED`."""
    read = {f"{section}.{name}".lstrip(".") for section, names in READ.items() for name in names.split()}
    ruled = {path for rule in UNUSED for path in rule.paths}
    assert not read & ruled
    assert set(_leaves(Config)) == read | ruled - {"embed"}


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        (TIMM, "model.encoder.stages", 2),
        ({"train.begins_with": "w.safetensors"}, "model.encoder.weights", "w.pth"),
        ({}, "retrain.replay", 0.5),
        ({}, "retrain.epochs", 5),
        (FEATURES, "model.encoder.stages", 2),
        ({"embed.encoder.name": "timm:x"}, "embed.encoder.stages", 2),
        (FEATURES, "model.encoder.channels", 1),
        (FEATURES, "model.mean", [0.5, 0.5, 0.5]),
        (BASELINE, "train.explore_epochs", 3),
        ({"model.select.mode": "every"}, "train.explore_epochs", 3),
        (BASELINE, "train.reselect_every", 2),
        (BASELINE, "model.select.rank", "heads"),
        ({"model.aggregator.heads": 1}, "model.select.rank", "heads"),
        ({}, "model.select.learn_from", "drawn"),
        ({"model.select.context": "all", "train.freeze_encoder": True}, "model.select.learn_from", "drawn"),
        (BASELINE, "train.score_dtype", "bfloat16"),
        (BASELINE, "train.score_batch", 64),
        (BASELINE, "train.compile", True),
        ({"model.select.mode": "every"}, "model.select.memory", 7),
        ({"model.aggregator.pool": "gated"}, "model.aggregator.heads", 4),
        ({"model.aggregator.pool": "max"}, "model.aggregator.hidden_dim", 4),
        ({"model.select.mode": "window"}, "train.shard_above", 1000),
        ({"train.source": "stream"}, "train.shard_above", 1000),
        ({}, "train.grad_chunk", 8),
        ({}, "train.monitor", "score"),
        ({}, "cluster.readers_per_worker", 2),
        ({}, "storage.features", "s3://b/f"),
        ({"train.source": "stream"}, "embed", {"encoder": {"name": "resnet50"}}),
        (MNIST, "tiling.codec", "encoded"),
        (MNIST, "cohort.split.train", 0.5),
        ({"tiling.mpp": None}, "tiling.default_mpp", 0.5),
        ({"tiling.tissue": "none"}, "tiling.artefacts", "keep"),
        ({"tiling.tissue": "model"}, "tiling.tissue_threshold", 20),
        (GIVEN, "tiling.min_sharpness", 50),
        (GIVEN, "tiling.tissue", "none"),
        (GIVEN, "tiling.context_mpp", 2.0),
        ({}, "cohort.specimen", "block"),
        (GIVEN, "tiling.min_tissue", 0.5),
        (FEATURES, "cohort.features", "folder"),
        ({"tiling.coords": "folder"}, "tiling.min_tissue", 0.5),
        ({"tiling.coords": "folder"}, "tiling.overlap_px", 16),
        ({"tiling.coords": "folder"}, "tiling.tissue", "model"),
    ],
)
def test_what_would_be_ignored_is_named_with_a_remedy(where: dict[str, Any], field: str, value: object) -> None:
    default = unused(_given({**where}))
    assert default == []
    (problem,) = unused(_given({**where, field: value}))
    assert problem.startswith(f"{field}: has no effect ")
    assert f"; set {field}=" in problem
    assert "its default, or " in problem


def test_what_has_an_effect_is_no_fault() -> None:
    used = {"train.bounded": True, "train.norm": "group", "train.grad_chunk": 8, "train.patience": 3}
    assert unused(_given({**used, "train.monitor": "score", "train.score_dtype": "bfloat16"})) == []
    assert unused(_given({**BASELINE, "train.shard_above": None})) == []  # as it is anyway
    assert unused(_given({"model.aggregator.pool": "gated", "model.aggregator.hidden_dim": 9})) == []
    assert unused(_given({"model.select.context": "all", "model.select.learn_from": "drawn"})) == []
    assert unused(_given({"model.select.rank": "heads"})) == []
    tasks = [{"name": name, "column": name} for name in ("a", "b")]
    assert unused({**_given({"model.select.rank": "heads", "model.aggregator.heads": 1}), "tasks": tasks}) == []


def test_a_config_dumped_whole_has_no_fault() -> None:
    for more in ({}, BASELINE, {"model.select.mode": "every"}, {"model.encoder.name": "timm:x"}):
        dumped = Config.model_validate(_given(more)).model_dump(mode="json")
        assert unused(dumped) == []


def test_they_are_told_together_with_all_other_problems() -> None:
    wrong = ["model.select.mode=random", "train.explore_epochs=5", "train.compile=true", "train.lr=fast", "train.x=1"]
    with pytest.raises(ConfigError) as caught:
        load_config("default", wrong, CONF)
    text = str(caught.value)
    assert len(caught.value.problems) == 5, text
    for part in (
        "train.explore_epochs: has no effect with model.select.mode=random and every, which score no patches; set "
        "train.explore_epochs=0, its default, or set model.select.mode=exact or window (got 5)",
        "train.compile: has no effect",
        "train.lr: ",
        "train.x: unknown key",
        "cohort.uri: is required",
    ):
        assert part in text, text


@pytest.mark.parametrize("broken", [{"train": 5}, {"cohort": None}, {"embed": None}, {"model": {"encoder": "x"}}])
def test_a_section_that_is_none_is_left_to_its_own_check(broken: dict[str, Any]) -> None:
    assert unused({**_given({}), **broken}) == []
    assert unused({}) == unused({"model": {"aggregator": {"heads": 1}}}) == []
