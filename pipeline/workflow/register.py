"""The register stage: the trained model becomes a version in the registry, and the champion unless a gate decides."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import TrackingError
from pipeline.inference.metrics import MEASURES
from pipeline.inference.operating import THRESHOLD
from pipeline.model.calibration import CALIBRATION
from pipeline.model.folder import SEEN
from pipeline.storage.files import download, exists, join, parent
from pipeline.tracking.tracker import connect
from pipeline.training.saver import model_folder
from pipeline.workflow.stage import Record, Stage, Workspace, slide_tags

if TYPE_CHECKING:
    from pipeline.tracking.registry import RegisteredVersion

log = logging.getLogger(__name__)


def identity(space: Workspace) -> Mapping[str, Any]:
    """The model that was evaluated, and where it goes."""
    tracking = space.config.tracking
    return {"evaluate": space.records["evaluate"].fingerprint, "model": tracking.model, "registry": tracking.uri}


def outdated(space: Workspace, record: Record) -> str | None:
    """Why the record does not hold; the registry is asked, for others move its aliases and delete its versions."""
    from pipeline.tracking.registry import champion, gated_by

    found = _found(space, record)
    if isinstance(found, str):
        return found
    tracker = connect(str(space.config.tracking.uri))
    holder = champion(tracker, found.name)
    if holder == found.version or gated_by(tracker, found.name) is not None:
        return None
    return f"version {found.version} of {found.name} is registered, but the champion is {holder or 'nobody'}"


def _found(space: Workspace, record: Record) -> RegisteredVersion | str:
    """The version of the trained model; or why there is none."""
    from pipeline.tracking.registry import find_registered

    tracking = space.config.tracking
    assert tracking.uri is not None  # compose.py fills both
    assert tracking.model is not None
    try:
        found = find_registered(connect(tracking.uri), tracking.model, _tags(space))
    except TrackingError as error:
        return str(error).splitlines()[0]
    gone = f"version {record.facts['version']} of {tracking.model} is no longer in the registry"
    return gone if found is None else found


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


@contextmanager
def trained_folder(checkpoint: str) -> Iterator[Path]:
    """A training's model as a local folder, with what it was trained on where the training noted that."""
    with model_folder(checkpoint) as folder:
        noted = join(parent(checkpoint), SEEN)
        if exists(noted):
            download(noted, folder / SEEN)
        yield folder


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
    tested = space.records["evaluate"].outputs if "evaluate" in space.records else {}
    with trained_folder(train.outputs["checkpoint"]) as folder:
        if "calibration" in tested:  # written since predictions have intervals
            download(tested["calibration"], folder / CALIBRATION)
        elif tested:
            log.warning(
                "register: predictions of this version will have no intervals, as its evaluation kept no cases of the "
                "test split: it was another split's, or an earlier release's, and runs anew with another "
                "evaluate.bootstrap"
            )
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


def _enter_fold(space: Workspace, stage_fingerprint: str, run_id: str) -> Record:
    train = space.config.train
    tags = {**_tags(space), "folds": str(train.folds), "fold": str(train.fold)}
    made = enter(space, run_id, tags, space.records["evaluate"].metrics, _description(space))
    return Record("enter", stage_fingerprint, {}, {}, {"model": made.name, "version": made.version, "uri": made.uri})


def _fold_gone(space: Workspace, record: Record) -> str | None:
    found = _found(space, record)
    return found if isinstance(found, str) else None


ENTER = Stage("enter", identity, _enter_fold, _fold_gone)
"""Makes the model of a fold a version; no alias moves, as for one of several that only together say something."""
