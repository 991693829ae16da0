"""The model registry: a trained folder becomes a version that anyone with MLflow can load and serve."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from pipeline.errors import PipelineError, TrackingError
from pipeline.model.folder import read_config
from pipeline.tracking.package import gather_artifacts, gather_members, write_package
from pipeline.tracking.places import missing
from pipeline.tracking.tracker import Store, Tracker, reported

CHAMPION = "champion"
"""Alias of the version that `predict` uses."""
PREVIOUS = "previous"
"""Alias of the champion before it, to go back to."""
CHALLENGER = "challenger"
"""Alias of the version that is judged, or waits for a person."""
GATED = "release.root"
"""Tag of a model whose champion is decided by `retrain`: the root that keeps the decisions."""
PLACED = "release.act"
"""Tag of such a model: the act that its aliases were brought to last."""

_DESCRIPTION_CHARS = 5000  # of MLflow's database
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model."""

    name: str
    version: str
    run_id: str
    """The run it was registered from."""
    tags: Mapping[str, str]
    """Lineage."""

    @property
    def uri(self) -> str:
        """`models:/NAME/VERSION`."""
        return f"models:/{self.name}/{self.version}"


def register_model(
    tracker: Tracker,
    name: str,
    folders: Path | Sequence[Path],
    run_id: str,
    *,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
    example_uri: str,
    description: str = "",
) -> RegisteredVersion:
    """Make a new version of model `name`; no alias moves (see `promote`).

    Args:
        tracker: of the run's experiment.
        name: of the registered model; it is made when absent.
        folders: one with weights.safetensors and config.json (`checkpoint.save_model`); or several of one recipe, whose
            mean is the model.
        run_id: the run the model belongs to.
        metrics: logged in that run, linked to the model.
        tags: lineage: cohort digest, slide keys digest, tiling fingerprint, git sha, image.
        example_uri: a slide, for the input example.
        description: of the version, for people (Markdown).

    Raises:
        TrackingError: the registry or the artifact store cannot be reached or refuses.
        ConfigError: the network that finds the model's tissue is another file than the one that its config names.
        StorageError: it, or the weights that make the model's features, cannot be read.
    """
    client, config = tracker.client, read_config(folders if isinstance(folders, Path) else folders[0])
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(folders, Path):
            artifacts = gather_artifacts(folders, config, Path(scratch))
        else:
            artifacts = gather_members(folders, config, Path(scratch))
        with _logged_model(tracker, name, run_id, tags) as logged:
            model = Model(model_uuid=logged.model_id, run_id=run_id, model_id=logged.model_id)
            with _place_reported(tracker.uri, "written to", logged.artifact_location):
                write_package(Path(scratch) / "model", artifacts, config, example_uri, model)
                client.log_model_artifacts(logged.model_id, str(Path(scratch) / "model"))
            with reported(tracker.uri), _current_store(tracker.uri):
                client.finalize_logged_model(logged.model_id, "READY")
                client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
                tracker.log_metrics(run_id, metrics, model_id=logged.model_id)
                if _find_model(tracker, name) is None:
                    client.create_registered_model(name)
                made = client.create_model_version(
                    name,
                    f"models:/{logged.model_id}",
                    run_id=run_id,
                    tags=dict(tags),
                    model_id=logged.model_id,
                    description=description,
                )
    return RegisteredVersion(name, str(made.version), run_id, dict(tags))


@contextmanager
def _logged_model(tracker: Tracker, name: str, run_id: str, tags: Mapping[str, str]) -> Iterator[LoggedModel]:
    """A new model of a run for the length of a block; FAILED where the block fails, not PENDING for ever."""
    client = tracker.client
    with reported(tracker.uri):
        logged = client.create_logged_model(
            tracker.experiment_id, name, source_run_id=run_id, tags=dict(tags), model_type="slide-level IPS"
        )
    try:
        yield logged
    except BaseException as error:
        try:
            with reported(tracker.uri):
                client.finalize_logged_model(logged.model_id, "FAILED")
        except TrackingError as unreachable:
            error.add_note(f"The model {logged.model_id} could not be marked FAILED: {unreachable}")
        raise


@contextmanager
def _place_reported(uri: str, done: str, place: str) -> Iterator[None]:
    """Turn what goes wrong with a model's files, not with MLflow's own store, into a TrackingError that says so."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        raise TrackingError(
            f"MLflow at {uri}: the model's files cannot be {done} {place}: {type(error).__name__}: {error}\n"
            "Check that the place can be reached from this machine (AWS_* for S3), read and written, and has room; "
            "then run the same command again."
        ) from error


def promote(store: Store, name: str, version: str) -> str | None:
    """Make a version the champion and the former champion `previous`; returns the former one's version.

    MLflow has no compare-and-set of aliases: the alias is read right before it is written, and callers
    promote from one job at a time.
    """
    with reported(store.uri):
        former = _aliases(store.client.get_registered_model(name)).get(CHAMPION)
        if former is not None and former != version:
            store.client.set_registered_model_alias(name, PREVIOUS, former)
        store.client.set_registered_model_alias(name, CHAMPION, version)
    return former


def alias_version(store: Store, name: str, alias: str) -> str | None:
    """The version that an alias points at; None where it points nowhere, or there is no such model.

    Asked for by itself: searches of versions come without their aliases.
    """
    with reported(store.uri):
        try:
            return str(store.client.get_model_version_by_alias(name, alias).version)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None


def add_file(store: Store, version: RegisteredVersion, file: Path) -> None:
    """Put a file beside a version's weights, where loading it finds it; one of the same name is replaced.

    Raises:
        TrackingError: the artifact store cannot be reached or refuses, or the version is a copy of another one.
    """
    with reported(store.uri):
        source = store.client.get_model_version(version.name, version.version).source
    kind, _, model_id = source.partition("models:/")
    if kind or "/" in model_id or "@" in model_id:  # `register_model` makes it of a logged model
        raise TrackingError(f"{version.uri}: its files belong to {source}, where nothing is put beside them")
    with reported(store.uri):
        logged = store.client.get_logged_model(model_id)
    with _place_reported(store.uri, "written to", logged.artifact_location), tempfile.TemporaryDirectory() as scratch:
        shutil.copy(file, scratch)
        store.client.log_model_artifacts(logged.model_id, scratch, "artifacts")


def has_version(store: Store, name: str, version: str) -> bool:
    """Whether the registry has a version; people delete some."""
    with reported(store.uri):
        try:
            store.client.get_model_version(name, version)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True


def point(store: Store, name: str, alias: str, version: str | None) -> None:
    """Let an alias point at a version, or nowhere, and read that back.

    Raises:
        TrackingError: the registry has something else afterwards.
    """
    with reported(store.uri):
        if version is not None:
            store.client.set_registered_model_alias(name, alias, version)
        elif alias_version(store, name, alias) is not None:
            store.client.delete_registered_model_alias(name, alias)
    found = alias_version(store, name, alias)
    if found != version:
        raise TrackingError(
            f"MLflow at {store.uri}: {alias} of {name} was set to {version or 'nobody'} and is {found or 'nobody'}: "
            "someone else moves it; run `release repair` once nobody does"
        )


def gated_by(store: Store, name: str) -> str | None:
    """The root whose decisions say who is champion; None where none do."""
    return model_tag(store, name, GATED)


def model_tag(store: Store, name: str, key: str) -> str | None:
    """A tag of a registered model; None where there is none, or no such model."""
    with reported(store.uri):
        model = _find_model(store, name)
    return None if model is None else dict(model.tags).get(key)


def tag_model(store: Store, name: str, tags: Mapping[str, str]) -> None:
    """Set tags of a registered model."""
    with reported(store.uri):
        for key, value in tags.items():
            store.client.set_registered_model_tag(name, key, value)


def tag_version(store: Store, name: str, version: str, tags: Mapping[str, str], description: str) -> None:
    """Set tags of a version, and what a person reads of it (Markdown)."""
    with reported(store.uri):
        for key, value in tags.items():
            store.client.set_model_version_tag(name, version, key, value)
        store.client.update_model_version(name, version, description[:_DESCRIPTION_CHARS])


def find_registered(store: Store, name: str, tags: Mapping[str, str]) -> RegisteredVersion | None:
    """The newest version of a model that carries these tags; None where there is none, or no such model."""
    with reported(store.uri):
        found = [
            entry
            for entry in store.client.search_model_versions(f"name='{name}'")
            if tags.items() <= dict(entry.tags).items()
        ]
    if not found:
        return None
    entry = max(found, key=lambda entry: int(entry.version))
    return RegisteredVersion(name, str(entry.version), entry.run_id, dict(entry.tags))


def champion(store: Store, name: str) -> str | None:
    """The version that is champion; None where none is, or there is no such model."""
    with reported(store.uri):
        model = _find_model(store, name)
    return None if model is None else _aliases(model).get(CHAMPION)


def find_version(store: Store, model_uri: str) -> RegisteredVersion:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` means now.

    Raises:
        TrackingError: no such model, alias or version; the message lists what there is.
    """
    match = _MODEL_URI.fullmatch(model_uri)
    if match is None:
        raise TrackingError(f"{model_uri!r} is no model URI; write models:/NAME@ALIAS or models:/NAME/VERSION")
    name = match["name"]
    with reported(store.uri):
        model = _find_model(store, name)
        if model is None:
            names = [other.name for other in store.client.search_registered_models(max_results=50)]
            raise TrackingError(
                f"{model_uri}: the registry at {store.uri} has no model {name!r}, only {names}; register it "
                "first (`pipeline run`), or correct the name or tracking.uri"
            )
        entries = {str(entry.version): entry for entry in store.client.search_model_versions(f"name='{name}'")}
        entry = entries.get(match["version"] or _aliases(model).get(match["alias"], ""))
    if entry is None:
        raise TrackingError(
            f"{model_uri}: model {name!r} at {store.uri} has versions {sorted(map(int, entries))} and aliases "
            f"{_aliases(model)}; use one of these"
        )
    return RegisteredVersion(name, str(entry.version), entry.run_id, dict(entry.tags))


def fetch(store: Store, model_uri: str, folder: Path) -> tuple[RegisteredVersion, Path]:
    """Download a version's files (weights.safetensors, config.json) into `folder`; returns where they lie.

    Raises:
        TrackingError: as `find_version`, or the artifacts cannot be read.
    """
    version = find_version(store, model_uri)
    with reported(store.uri):
        place = store.client.get_model_version_download_uri(version.name, version.version)
    if (gone := missing(store.uri, place)) is not None:
        raise TrackingError(f"{version.uri}: {gone}")
    with _place_reported(store.uri, "read from", place), _current_store(store.uri):
        local = download_artifacts(f"{version.uri}/artifacts", dst_path=str(folder))
    return version, Path(local)


@contextmanager
def _current_store(uri: str) -> Iterator[None]:
    """MLflow resolves `models:/...` through the process-wide URI, whatever URI the client has."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def _aliases(model: RegisteredModel) -> dict[str, str]:
    return {alias: str(version) for alias, version in model.aliases.items()}


def _find_model(store: Store, name: str) -> RegisteredModel | None:
    try:
        return store.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
