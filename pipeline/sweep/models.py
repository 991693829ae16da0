"""The models of a sweep: looked up once, named by what they are, and kept where every worker finds them."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.recipe import Config
from pipeline.config.sweep import LAST
from pipeline.errors import ConfigError, PipelineError, StageError
from pipeline.inference.operating import thresholds
from pipeline.model.folder import (
    CONFIG,
    EMBED_WEIGHTS,
    SEEN,
    TISSUE_NETWORK,
    WEIGHTS,
    Seen,
    keep_model,
    model_digest,
    read_config,
    read_seen,
    weight_files,
)
from pipeline.storage.files import download, exists, join, upload, write_json
from pipeline.tracking.registry import fetch
from pipeline.tracking.tracker import connect
from pipeline.training.saver import model_folder, progress_of
from pipeline.workflow.run import finished

log = logging.getLogger(__name__)

_COMMIT = "model.json"


@dataclass(frozen=True)
class SweepModel:
    """One model, as it was when the sweep began."""

    name: str
    """In reports."""
    origin: str
    """The version, or the checkpoint's URI."""
    digest: str
    """Of its weights and of what decides its predictions."""
    config: Config
    folder: str
    """Of its files: where it was fetched to, and after `keep` where every worker finds them."""
    bytes: int
    """Of its weights."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Binary task -> the score from which it is called positive, chosen on validation slides; none of older models."""
    seen: Seen | None = None
    """What it was trained and validated on; None where that is not known."""


def resolve_models(config: Config, scratch: Path) -> tuple[list[SweepModel], dict[str, str]]:
    """The models that the config names, fetched below `scratch`; and name -> why a model cannot be had.

    Raises:
        ConfigError: two names mean one model.
        StageError: none can be had.
    """
    assert config.sweep is not None
    found: list[SweepModel] = []
    failed: dict[str, str] = {}
    for number, (name, uri) in enumerate(config.sweep.models.items()):
        folder = scratch / str(number)
        folder.mkdir()
        try:
            found.append(_resolve(config, name, uri, folder))
        except PipelineError as error:
            failed[name] = str(error)
            log.warning("sweep: the model %s (%s) cannot be had: %s", name, uri, error)
    if not found:
        reasons = "\n".join(f"  - {name}: {reason}" for name, reason in failed.items())
        raise StageError(f"sweep: none of {len(failed)} models can be had:\n{reasons}")
    _check_once(found)
    return found, failed


def _resolve(config: Config, name: str, uri: str, folder: Path) -> SweepModel:
    tags: Mapping[str, str] = {}
    if uri.startswith("models:/"):
        assert config.tracking.uri is not None  # compose.py fills it
        version, local = fetch(connect(config.tracking.uri), uri, folder)
        origin, tags = version.uri, version.tags
    else:
        origin = finished(config, "train").outputs["checkpoint"] if uri == LAST else uri
        tags, local = _fetch_folder(origin, folder), folder
    own = read_config(local)
    weights = weight_files(local)
    return SweepModel(
        name=name,
        origin=origin,
        digest=model_digest(own, weights),
        config=own,
        folder=str(local),
        bytes=sum(path.stat().st_size for path in weights),
        thresholds=thresholds(tags),
        seen=read_seen(local),
    )


def _fetch_folder(origin: str, folder: Path) -> dict[str, str]:
    """A checkpoint, or another folder of a model, into a local one; and what was noted of it."""
    run, _, step = origin.rpartition("/")
    if not exists(join(origin, "checkpoint.json")):
        for name in (WEIGHTS, CONFIG):
            if not exists(join(origin, name)):
                raise StageError(f"{join(origin, name)} is absent; name the folder of a checkpoint or a model")
            download(join(origin, name), folder / name)
        _download_there(origin, folder)
        return {}
    with model_folder(origin) as whole:
        for name in (WEIGHTS, CONFIG):
            (whole / name).rename(folder / name)
    _download_there(run, folder)
    return {key: str(value) for key, value in progress_of(run, step).metrics.items()}


def _download_there(origin: str, folder: Path) -> None:
    """What may stand beside a model: what it has seen, the weights that make its features, its tissue network."""
    for name in (SEEN, EMBED_WEIGHTS, TISSUE_NETWORK):
        if exists(join(origin, name)):
            download(join(origin, name), folder / name)


def _check_once(models: list[SweepModel]) -> None:
    named: defaultdict[str, list[SweepModel]] = defaultdict(list)
    for model in models:
        named[model.digest].append(model)
    problems = [
        f"sweep.models: {' and '.join(f'{one.name} ({one.origin})' for one in same)} are one model, whose cells "
        "would be asked twice; remove all but one"
        for same in named.values()
        if len(same) > 1
    ]
    if problems:
        raise ConfigError("config", problems)


def keep(model: SweepModel, root: str) -> str:
    """Copy a model's files below `root`, unless they are there, and return their folder.

    So every worker finds them, and a sweep that goes on has the models that it began with, whatever became of them.
    """
    folder = join(root, "models", model.digest)
    if not exists(join(folder, _COMMIT)):
        keep_model(Path(model.folder), folder)
        write_json(join(folder, _COMMIT), {"origin": model.origin})
    network = Path(model.folder) / TISSUE_NETWORK  # a checkpoint's kept files, of the same digest, are without it
    if network.is_file() and not exists(join(folder, TISSUE_NETWORK)):
        upload(network, join(folder, TISSUE_NETWORK))
    return folder


def same_tasks(models: list[SweepModel]) -> None:
    """ConfigError unless all models predict the same of one kind of files: else no table could hold them all."""
    first = models[0]
    problems = [
        f"sweep.models.{model.name}: learned from patients of several slides, and a sweep scores slide by slide; leave "
        "it out, and compare `evaluate`'s reports"
        for model in models
        if model.config.cohort.bag == "patient"
    ]
    for model in models[1:]:
        ours, theirs = _tasks(first.config), _tasks(model.config)
        if ours != theirs:
            problems.append(
                f"sweep.models.{model.name}: predicts {json.dumps(theirs)}, and {first.name} {json.dumps(ours)}; "
                "compare models of one task in a sweep of their own"
            )
        if first.config.given_features != model.config.given_features:
            problems.append(
                f"sweep.models: of {first.name} and {model.name} one takes features that other tools have made, and "
                "the other slides; compare them in sweeps of their own"
            )
    if problems:
        raise ConfigError("config", problems)


def _tasks(config: Config) -> list[dict[str, object]]:
    """What decides the columns that a task reads and the numbers that it gives."""
    names = {"name", "column", "kind", "classes", "event_column", "bins"}
    return [task.model_dump(mode="json", include=names) for task in config.tasks]
