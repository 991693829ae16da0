"""Fields that have no effect where others stand as they do: a value given to one would be ignored in silence.

A field at its default is never a fault, so that a config may be dumped whole and read again. What depends on the data
is not looked at (`tiling.min_tissue` with `tissue: none` still counts for slides that bring a mask), nor how many
workers there are: a recipe for four runs on one. Contradictions that no default resolves stand in the sections.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from pipeline.config.recipe import Config


@dataclass(frozen=True)
class Unused:
    """Fields that nothing reads while a condition holds."""

    paths: tuple[str, ...]
    """Dotted."""
    when: Callable[[Config], bool]
    why: str
    """Follows `has no effect`."""
    remedy: str
    """What would give it one."""
    agreeing: tuple[object, ...] = ()
    """Values that ask for what happens anyway."""


def _selects(config: Config) -> bool:
    return config.model.select.mode not in ("random", "every")


def _given(config: Config) -> bool:
    return config.model.encoder.name == "features" and config.embed is None


def _one_logit(config: Config) -> bool:
    tasks = vars(config).get("tasks")  # not validated yet
    return config.model.aggregator.heads == 1 and isinstance(tasks, list | tuple) and len(tasks) == 1


def _is_resnet(name: str) -> bool:
    return str(name).startswith("resnet")


def _paths(section: str, *fields: str) -> tuple[str, ...]:
    return tuple(f"{section}.{field}" for field in fields)


UNUSED: tuple[Unused, ...] = (
    Unused(
        (
            "storage.patches",
            *_paths("cohort.split", "train", "val", "test"),
            *_paths("tiling", "mpp_tolerance", "default_mpp", "artefacts", "min_tissue", "codec", "jpeg_quality"),
            *_paths("tiling", "edge", "tissue_threshold", "tissue_closing_px", "min_sharpness"),
            *_paths("tiling", "max_bad_tiles", "cpus", "max_seconds", "max_slide_gib", "cache", "cache_gib", "coords"),
        ),
        lambda c: c.cohort.megapixel_mnist is not None,
        "on cohort.megapixel_mnist, whose images come with splits and are drawn, not cut out of slides",
        "take another cohort",
    ),
    Unused(
        ("embed",),
        lambda c: c.cohort.megapixel_mnist is not None or c.train.source == "stream",
        "without a store of patches",
        "take a cohort of slides and train.source=store",
    ),
    Unused(
        ("cohort.specimen",),
        lambda c: c.cohort.bag != "patient",
        "with cohort.bag=slide, of which each is a bag",
        "set cohort.bag=patient",
    ),
    Unused(
        ("cohort.features",),
        lambda c: not _given(c),
        "except with model.encoder.name=features and without embed, which makes features itself",
        "set model.encoder.name=features and embed=null",
    ),
    Unused(
        (
            *_paths("tiling", "default_mpp", "overlap_px", "edge", "tissue", "artefacts", "tissue_threshold"),
            *_paths("tiling", "tissue_closing_px", "min_tissue", "codec", "jpeg_quality", "max_bad_tiles"),
            *_paths("tiling", "min_sharpness", "cpus", "max_seconds", "max_slide_gib", "cache", "cache_gib"),
            "tiling.context_mpp",
        ),
        lambda c: _given(c),
        "on features that other tools have made, of patches that they have cut",
        "set embed.encoder.name, which makes features of slides",
    ),
    Unused(("storage.features",), lambda c: c.embed is None, "without features", "set embed.encoder.name"),
    Unused(("tiling.default_mpp",), lambda c: c.tiling.mpp is None, "where level 0 is read as it is", "set tiling.mpp"),
    Unused(
        ("tiling.artefacts", "tiling.tissue_threshold", "tiling.tissue_closing_px"),
        lambda c: c.tiling.tissue != "otsu",
        "except with tiling.tissue=otsu",
        "set tiling.tissue=otsu",
    ),
    Unused(
        ("tiling.min_tissue", "tiling.overlap_px", "tiling.edge"),
        lambda c: c.tiling.coords is not None,
        "with tiling.coords, which say where the patches are",
        "remove tiling.coords",
    ),
    Unused(
        ("tiling.tissue",),
        lambda c: c.tiling.coords is not None and c.tiling.tissue == "model",
        "with tiling.coords, which say where the patches are: the network of tiling.tissue_model would not be run",
        "remove tiling.coords",
    ),
    Unused(
        ("model.encoder.stages",),
        lambda c: not _is_resnet(c.model.encoder.name),
        "except in ResNets",
        "set model.encoder.name=resnet18",
    ),
    Unused(
        ("embed.encoder.stages",),
        lambda c: c.embed is not None and not _is_resnet(c.embed.encoder.name),
        "except in ResNets",
        "set embed.encoder.name=resnet50",
    ),
    Unused(
        ("model.encoder.channels", "model.mean", "model.std"),
        lambda c: c.model.encoder.name == "features",
        "on features, which have no pixels",
        "set embed.mean and embed.std, for the network that makes the features, or take an encoder of pixels",
    ),
    Unused(
        _paths("model.aggregator", "heads", "key_dim", "dropout"),
        lambda c: c.model.aggregator.pool != "attention",
        "except with pool: attention",
        "set model.aggregator.pool=attention",
    ),
    Unused(
        ("model.aggregator.hidden_dim",),
        lambda c: c.model.aggregator.pool in ("mean", "max"),
        "with pool: mean and max, which learn nothing",
        "set model.aggregator.pool=attention or gated",
    ),
    Unused(
        ("model.select.memory",),
        lambda c: c.model.select.mode == "every",
        "with model.select.mode=every, which keeps all patches",
        "choose another mode",
    ),
    Unused(
        (
            "model.select.rank",
            *_paths("train", "explore_epochs", "reselect_every", "score_dtype", "score_batch", "compile"),
        ),
        lambda c: not _selects(c),
        "with model.select.mode=random and every, which score no patches",
        "set model.select.mode=exact or window",
    ),
    Unused(
        ("model.select.rank",),
        _one_logit,
        "with one head and one task, whose order is that of the mean",
        "set model.aggregator.heads=8",
    ),
    Unused(
        ("model.select.learn_from",),
        lambda c: c.train.freeze_encoder is True,
        "with train.freeze_encoder=true: the encoder learns of none",
        "set train.freeze_encoder=false",
    ),
    Unused(
        ("model.select.learn_from",),
        lambda c: c.model.select.context == "none",
        "with model.select.context=none: the encoder learns from all patches that are pooled",
        "set model.select.context=all",
    ),
    Unused(
        ("train.shard_above",),
        lambda c: c.model.select.mode != "exact",
        "except with model.select.mode=exact: other selections are not shared",
        "set it to null, or model.select.mode=exact",
        agreeing=(None,),
    ),
    Unused(
        ("train.shard_above",),
        lambda c: c.train.source == "stream",
        "with train.source=stream: workers share no streamed slide",
        "set it to null, or train.source=store",
        agreeing=(None,),
    ),
    Unused(("train.grad_chunk",), lambda c: not c.train.bounded, "except with train.bounded", "set train.bounded=true"),
    Unused(
        ("train.monitor",),
        lambda c: c.train.patience is None and not c.train.keep_best,
        "without train.patience or train.keep_best",
        "set one of them",
    ),
    Unused(
        ("model.encoder.weights",),
        lambda c: c.train.begins_with is not None,
        "where train.begins_with gives the weights of the whole network",
        "set train.begins_with=null",
    ),
    Unused(
        _paths("retrain", "replay", "epochs", "lr", "warmup_epochs"),
        lambda c: c.retrain.start != "warm",
        "with retrain.start=cold, which trains as `run` does",
        "set retrain.start=warm",
    ),
    Unused(
        ("cluster.readers_per_worker",),
        lambda c: c.train.source != "stream",
        "except with train.source=stream",
        "set train.source=stream",
    ),
)


def unused(given: Mapping[str, Any]) -> list[str]:
    """One sentence for every field of a config, not validated yet, whose value nothing would read."""
    config = _as_given(Config, given)
    problems = []
    for rule in UNUSED:
        for path in rule.paths if rule.when(config) else ():
            value, default = _look_up(config, path)
            if value != default and value not in rule.agreeing:
                got = "" if isinstance(value, BaseModel) else f" (got {_yaml(value)})"
                reset = f"set {path}={_yaml(default)}, its default"
                problems.append(f"{path}: has no effect {rule.why}; {reset}, or {rule.remedy}{got}")
    return problems


def _as_given(section: type[BaseModel], given: Mapping[str, Any]) -> Any:
    """The section with the given values as they are, wrong ones too, and defaults: so all faults are told at once."""
    values = dict(given)
    for name, field in section.model_fields.items():
        inner = next((kind for kind in _alternatives(field.annotation) if _is_section(kind)), None)
        if inner is None:
            continue
        if isinstance(given.get(name), Mapping):
            values[name] = _as_given(inner, given[name])
        elif field.is_required():
            values[name] = _as_given(inner, {})
        else:
            values.pop(name, None)
    return section.model_construct(**values)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type there is."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _look_up(config: Config, path: str) -> tuple[Any, Any]:
    """The value at a path, and the field's default, as lists where they are sequences."""
    *sections, name = path.split(".")
    section: BaseModel = config
    for part in sections:
        section = getattr(section, part)
    found = getattr(section, name), type(section).model_fields[name].get_default()
    value, default = (list(each) if isinstance(each, tuple) else each for each in found)
    return value, default


def _yaml(value: object) -> str:
    """As it is written in an override."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
