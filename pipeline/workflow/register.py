"""The register stage: the trained model becomes a version in the registry, and the champion unless a gate decides."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import TrackingError
from pipeline.inference.metrics import MEASURES
from pipeline.inference.operating import THRESHOLD
from pipeline.model.folder import SEEN
from pipeline.storage.files import download, exists, join, parent
from pipeline.tracking.tracker import connect
from pipeline.training.saver import model_folder
from pipeline.workflow.stage import Record, Workspace, slide_tags

if TYPE_CHECKING:
    from pipeline.tracking.registry import RegisteredVersion

log = logging.getLogger(__name__)


def identity(space: Workspace) -> Mapping[str, Any]:
    """The model that was evaluated, and where it goes."""
    tracking = space.config.tracking
    return {"evaluate": space.records["evaluate"].fingerprint, "model": tracking.model, "registry": tracking.uri}


def outdated(space: Workspace, record: Record) -> str | None:
    """Why the record does not hold; the registry is asked, for others move its aliases and delete its versions."""
    from pipeline.tracking.registry import champion, find_registered, gated_by

    tracking, version = space.config.tracking, record.facts["version"]
    assert tracking.uri is not None  # compose.py fills both
    assert tracking.model is not None
    try:
        tracker = connect(tracking.uri)
        found = find_registered(tracker, tracking.model, _tags(space))
    except TrackingError as error:
        return str(error).splitlines()[0]
    if found is None:
        return f"version {version} of {tracking.model} is no longer in the registry"
    holder = champion(tracker, tracking.model)
    if holder == found.version or gated_by(tracker, tracking.model) is not None:
        return None
    return f"version {found.version} of {tracking.model} is registered, but the champion is {holder or 'nobody'}"


def _tags(space: Workspace) -> dict[str, str]:
    """By which a version of this very model is known again."""
    train, evaluated = space.records["train"], space.records["evaluate"]
    return {"train_fingerprint": train.fingerprint, "evaluate_fingerprint": evaluated.fingerprint}


def _description(space: Workspace) -> str:
    """What a person reads of the version, in Markdown."""
    train, evaluated, config = space.records["train"], space.records["evaluate"], space.config
    names = dict.fromkeys(f"{config.evaluate.split}_{name}" for each in MEASURES.values() for name in each)
    measured = ", ".join(_with_bounds(name, evaluated.metrics) for name in names if name in evaluated.metrics)
    return (
        f"Recipe {config.name}, seed {config.seed}: trained on {train.facts['train_slides']} slides, validated on "
        f"{train.facts['val_slides']}. On {evaluated.facts['slides']} slides of the {config.evaluate.split} split: "
        f"{measured}.\n\nReport: {evaluated.outputs['report']}, and report.html of run {evaluated.run_id}"
    )


def _with_bounds(name: str, metrics: Mapping[str, float]) -> str:
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    bounds = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
    return f"{name} {metrics[name]:.3f}{bounds}"


def _thresholds(train: Record) -> dict[str, str]:
    """What positive is called from, by the validation slides; and where the training is found."""
    chosen = {name: str(value) for name, value in train.metrics.items() if name.startswith(THRESHOLD)}
    return {**chosen, "train_run_id": str(train.run_id)}


def _add_seen(checkpoint: str, folder: Path) -> None:
    """What the model was trained on, where the training noted it."""
    noted = join(parent(checkpoint), SEEN)
    if exists(noted):
        download(noted, folder / SEEN)


def register(space: Workspace, stage_fingerprint: str, run_id: str) -> Record:
    """Make the model a version, unless it is one already; and that version the champion, unless a gate decides that."""
    from pipeline.tracking.registry import gated_by, promote

    tracker, name = space.tracker(), str(space.config.tracking.model)
    made = enter(space, run_id, _tags(space), space.records["evaluate"].metrics, _description(space))
    facts = {"model": name, "version": made.version}
    if (root := gated_by(tracker, name)) is not None:
        log.info("register: version %s; `retrain` decides who is champion (%s)", made.version, root)
        return Record("register", stage_fingerprint, {}, {}, facts)
    former = promote(tracker, name, made.version)
    return Record("register", stage_fingerprint, {}, {}, {**facts, "alias": "champion", "previous": former})


def enter(
    space: Workspace, run_id: str, tags: Mapping[str, str], metrics: Mapping[str, float], description: str
) -> RegisteredVersion:
    """The version of the trained model, made where none has these tags; no alias moves.

    Args:
        space: after training.
        run_id: the run that registers it.
        tags: by which a version of this very model is known again.
        metrics: linked to the model.
        description: in Markdown.
    """
    from pipeline.tracking.registry import find_registered, register_model

    tracker, name = space.tracker(), str(space.config.tracking.model)
    train = space.records["train"]
    found = find_registered(tracker, name, tags)
    if found is not None:
        return found
    with model_folder(train.outputs["checkpoint"]) as folder:
        _add_seen(train.outputs["checkpoint"], folder)
        return register_model(
            tracker,
            name,
            folder,
            run_id,
            tags={**space.lineage, **tags, **slide_tags(space), **_thresholds(train)},
            metrics=metrics,
            example_uri=space.cohort.slides[0].uri,
            description=description,
        )
