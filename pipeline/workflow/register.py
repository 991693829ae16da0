"""The register stage: the trained model becomes a version in the registry, and the champion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import TrackingError
from pipeline.tracking.tracker import connect
from pipeline.training.saver import model_folder
from pipeline.workflow.stage import Record, Workspace, slide_tags


def identity(space: Workspace) -> Mapping[str, Any]:
    """The model that was evaluated, and where it goes."""
    tracking = space.config.tracking
    return {"evaluate": space.records["evaluate"].fingerprint, "model": tracking.model, "registry": tracking.uri}


def outdated(space: Workspace, record: Record) -> str | None:
    """Why the record does not hold; the registry is asked, for others move its aliases and delete its versions."""
    from pipeline.tracking.registry import champion, find_registered

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
    if holder == found.version:
        return None
    return f"version {found.version} of {tracking.model} is registered, but the champion is {holder or 'nobody'}"


def _tags(space: Workspace) -> dict[str, str]:
    """By which a version of this very model is known again."""
    train, evaluated = space.records["train"], space.records["evaluate"]
    return {"train_fingerprint": train.fingerprint, "evaluate_fingerprint": evaluated.fingerprint}


def _description(space: Workspace) -> str:
    """What a person reads of the version, in Markdown."""
    train, evaluated, config = space.records["train"], space.records["evaluate"], space.config
    measured = ", ".join(
        f"{name} {value:.3f}" for name, value in sorted(evaluated.metrics.items()) if not name.endswith("s")
    )
    return (
        f"Recipe {config.name}, seed {config.seed}: trained on {train.facts['train_slides']} slides, validated on "
        f"{train.facts['val_slides']}. On {evaluated.facts['slides']} slides of the {config.evaluate.split} split: "
        f"{measured}.\n\nReport: {evaluated.outputs['report']}, and report.html of run {evaluated.run_id}"
    )


def register(space: Workspace, stage_fingerprint: str, run_id: str) -> Record:
    """Make the model a version, unless it is one already, and that version the champion."""
    from pipeline.tracking.registry import find_registered, promote, register_model

    tracker, name = space.tracker(), space.config.tracking.model
    assert name is not None  # compose.py fills it
    train, evaluated = space.records["train"], space.records["evaluate"]
    tags = _tags(space)
    registered = find_registered(tracker, name, tags)
    if registered is None:
        with model_folder(train.outputs["checkpoint"]) as folder:
            registered = register_model(
                tracker,
                name,
                folder,
                run_id,
                tags={**space.lineage, **tags, **slide_tags(space), "train_run_id": str(train.run_id)},
                metrics=evaluated.metrics,
                example_uri=space.cohort.slides[0].uri,
                description=_description(space),
            )
    former = promote(tracker, name, registered.version)
    facts = {"model": name, "version": registered.version, "alias": "champion", "previous": former}
    return Record("register", stage_fingerprint, {}, {}, facts)
