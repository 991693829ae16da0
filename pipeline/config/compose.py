"""From a config's name and `key=value` overrides to a validated `Config`.

Hydra's compose API picks the groups (`model=resnet18`); values (`train.lr=1e-3`) are set on the composed tree as
YAML, so that pydantic sees every problem at once and URIs may hold `=`, commas and spaces.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from pipeline.config.base import credential_in
from pipeline.config.encoders import PRESETS
from pipeline.config.environment import checked_environment, secrets_copied
from pipeline.config.model import EncoderConfig
from pipeline.config.recipe import Config
from pipeline.config.unused import unused
from pipeline.errors import ConfigError
from pipeline.storage.files import absolute, is_remote, join
from pipeline.storage.hub import SCHEME, hub_file

_MANIFESTS = "deploy"  # this folder of conf/ holds no group, but what `manifest` writes


class _Loader(yaml.SafeLoader):
    """YAML as Hydra reads the files: a date is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012, a table that yaml looks up on the class
        first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load_config(
    name: str, overrides: Sequence[str] = (), config_dir: Path | None = None, *, in_job: bool = False
) -> Config:
    """The validated config `name` of `config_dir`; raises ConfigError with all problems at once.

    `config_dir` defaults to `conf/` in the working directory, else the one that came with the package.
    Relative paths become absolute ones: Ray's workers run in directories of their own. `in_job`: what would be lost
    with a Ray job's directory is refused, as it is inside one.
    """
    folder = find_config_dir(config_dir)
    OmegaConf.register_new_resolver("conf_dir", lambda: str(folder), replace=True)  # ${conf_dir:} for files beside YAML
    if not (folder / f"{name}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"--config {name}", [f"{folder} has no {name}.yaml; it has: {known}"])
    groups, values, problems = _sort_overrides(overrides, folder)
    with checked_environment():
        tree = _composed(name, groups, folder)
        for key, value in values.items():
            problems += _set(tree, key, value)
        config, more = _validated(tree, values)
    problems += more
    if config is not None:
        problems += [*(_ray_job_problems(config) if in_job or in_ray_job() else ()), *_place_problems(config)]
    if problems or config is None:
        raise ConfigError(f"config {name}", problems)
    return _with_absolute_paths(config)


def find_config_dir(explicit: Path | None = None, here: Path | None = None) -> Path:
    """The folder of YAML files: the explicit one, `conf/` of `here` (the working directory), else the package's."""
    if explicit is not None:
        if not explicit.is_dir():
            raise ConfigError(f"--config-dir {explicit}", ["no such folder"])
        return explicit.resolve()
    package = Path(__file__).resolve().parents[1]
    places = [
        (here or Path.cwd()) / "conf",
        package.parent / "conf",
        package / "conf",
    ]  # one's own, a checkout's, a wheel's
    for place in places:
        if (place / "default.yaml").is_file():
            return place
    raise ConfigError("conf/", [f"no configuration at {' or '.join(map(str, places))}; name it with --config-dir"])


def in_ray_job() -> bool:
    """Whether this process is the entrypoint of a `ray job submit`; its directory is thrown away afterwards."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _sort_overrides(overrides: Sequence[str], folder: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """Group choices, values by dotted key, and what is wrong with the rest."""
    subfolders = [sub for sub in folder.iterdir() if sub.is_dir() and sub.name != _MANIFESTS]
    choices = {sub.name: sorted(path.stem for path in sub.glob("*.yaml")) for sub in subfolders}
    groups: list[str] = []
    values: dict[str, str] = {}
    problems: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            problems.append(f"{override!r}: an override is written key=value")
        elif key not in choices:
            values[key] = value
        elif value in choices[key]:
            groups.append(override)
        else:
            problems.append(f"{key}: no group file {value!r}; choose one of {', '.join(choices[key])}")
    return groups, values, problems


def _composed(name: str, groups: list[str], folder: Path) -> Any:
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            own = compose(name)  # a group that the config takes no file of, as sweep, is added
            tree = compose(name, overrides=[g if g.partition("=")[0] in own else f"+{g}" for g in groups])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"config {name}", [f"{folder}: {error}"]) from error
    OmegaConf.set_struct(tree, value=False)
    return tree


def _set(tree: Any, key: str, text: str) -> list[str]:
    """Set one dotted key to a YAML value; plain text where it is no YAML or an unbraced mapping (`a: b`)."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
    if isinstance(value, Mapping) and not text.lstrip().startswith("{"):
        value = text
    if isinstance(value, str) and " #" in text and text.lstrip()[:1] not in ("'", '"'):
        value = text  # no comment
    try:
        OmegaConf.update(tree, key, value, force_add=True)
    except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
        return [f"{key}: cannot be set ({str(error).splitlines()[0]})"]
    return []


def _validated(tree: Any, values: Mapping[str, str]) -> tuple[Config | None, list[str]]:
    """The config, and what is wrong with it; `values` are the overrides as they were typed."""
    try:
        plain = _without_missing(OmegaConf.to_container(tree, resolve=True))
    except OmegaConfBaseException as error:
        return None, [f"{error.full_key or 'config'}: {str(error).splitlines()[0]}"]
    if copied := secrets_copied(plain):
        return None, copied  # alone: what else is said of a value might repeat it
    try:
        return Config.model_validate(plain), unused(plain)
    except ValidationError as error:
        problems = error.errors()
    if leaks := [problem for problem in problems if credential_in(problem["input"]) is not None]:
        return None, [*map(_sentence, leaks)]
    problems = [problem for problem in problems if not (problem["type"] == "too_short" and problem["input"])]
    typed = {".".join(map(str, problem["loc"])) for problem in problems if _is_no_text(problem)} & values.keys()
    if not typed:
        return None, [*(_sentence(problem) for problem in problems), *unused(plain)]
    for key in typed:  # name=2024: what was typed is the text
        OmegaConf.update(tree, key, values[key].strip())
    return _validated(tree, {key: text for key, text in values.items() if key not in typed})


def _is_no_text(problem: Any) -> bool:
    """Whether YAML made a number or a truth value of what should be text."""
    return problem["type"] == "string_type" and isinstance(problem["input"], bool | int | float)


def _without_missing(value: Any) -> Any:
    """Drop `???`, the mark of a value that the user must give, so that it is reported as missing."""
    if isinstance(value, dict):
        return {key: _without_missing(item) for key, item in value.items() if item != "???"}
    return [_without_missing(item) for item in value] if isinstance(value, list) else value


def _sentence(problem: Any) -> str:
    """One pydantic error as `dotted.path: what is wrong; what to do`."""
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{path}: is required; give {path}=VALUE"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), _fields_at(problem["loc"][:-1]), n=1)
        return f"{path}: unknown key" + (f"; did you mean {near[0]}?" if near else "; remove it")
    if _is_no_text(problem):
        found, last = problem["input"], problem["loc"][-1]
        kind = "truth value" if isinstance(found, bool) else "number"
        return (
            f'{path}: must be text, and YAML reads it as the {kind} {found}; put it into quotes, as in {last}: "TEXT"'
        )
    if problem["type"] == "string_type":
        return f"{path}: must be text; give {path}=TEXT"
    if problem["type"] in ("tuple_type", "list_type"):
        return f"{path}: must be a list, as in {path}=[A,B] (got {problem['input']!r})"
    message = str(problem["msg"]).removeprefix("Value error, ")
    is_value = isinstance(problem["input"], str | int | float | bool) and credential_in(problem["input"]) is None
    return f"{path or 'config'}: {message}" + (f" (got {problem['input']!r})" if is_value else "")


def _fields_at(location: Sequence[int | str]) -> list[str]:
    """Names of the fields of the section at a location, for the did-you-mean."""
    section: Any = Config
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            kinds = [
                section.model_fields[part].annotation,
                *_arguments(section.model_fields[part].annotation),
            ]
            section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), section)
    return list(section.model_fields)


def _arguments(annotation: Any) -> tuple[Any, ...]:
    return tuple(getattr(annotation, "__args__", ()))


def _ray_job_problems(config: Config) -> list[str]:
    problems = []
    remedy = "the job's directory is thrown away when it ends; give an absolute path or an s3:// URI"
    for field, value in ((f"storage.{name}", place) for name, place in config.storage):
        if value is not None and not is_remote(value) and not Path(value).is_absolute():
            problems.append(f"{field}: {value!r} is relative inside a Ray job; {remedy}")
    scheme, _, file = (config.tracking.uri or "").partition(":///")
    if scheme.startswith("sqlite") and not Path(file).is_absolute():
        problems.append(
            f"tracking.uri: {config.tracking.uri!r} is relative inside a Ray job, whose directory is thrown away; give "
            "a tracking server or sqlite:////ABSOLUTE/mlflow.db"
        )
    if is_remote(config.storage.root) and config.tracking.uri is None:
        problems.append(
            "tracking.uri: is required in a Ray job whose storage.root is remote, because mlflow.db would be lost; "
            "give a tracking server or sqlite:////ABSOLUTE/mlflow.db"
        )
    return problems


def _place_problems(config: Config) -> list[str]:
    """Places in which MLflow, that takes them for addresses, would not write but beside them."""
    root, problems = absolute(config.storage.root), []
    if root.startswith("az://"):
        problems.append(
            f"storage.root: {root!r} would hold MLflow's artifacts too, which MLflow cannot keep there; take a disk or "
            "s3://, and az:// for storage.patches and storage.features"
        )
    if is_remote(root) and (odd := re.search(r"[?#]", root)):
        problems.append(
            f"storage.root: {root!r} holds {odd[0]!r}, at which MLflow ends the place of its artifacts, so that they "
            "would lie beside it; choose a place without it"
        )
    if config.tracking.uri is None and (odd := re.search(r"\?|%[0-9A-Fa-f]{2}", _database(root))):
        field = "tracking.uri: is required, for the working directory" if is_remote(root) else "storage.root:"
        problems.append(
            f"{field} {str(Path(_database(root)).parent)!r} holds {odd[0]!r}, which MLflow reads as another name for "
            "its file, so that it would lie beside it; choose a place without it, or set tracking.uri"
        )
    return problems


def _database(root: str) -> str:
    """The SQLite file of MLflow where no tracking server is named."""
    return join(str(Path.cwd()) if is_remote(root) else root, "mlflow.db")


def _weights(encoder: EncoderConfig) -> str:
    """Where the weights lie; those of huggingface.co are brought here."""
    assert encoder.weights is not None
    if not encoder.weights.startswith(SCHEME):
        return absolute(encoder.weights)
    preset = PRESETS.get(encoder.name)
    return hub_file(encoder.weights, None if preset is None else f"{preset.repository}/{preset.file}")


def _with_absolute_paths(config: Config) -> Config:
    storage = config.storage.model_copy(
        update={
            "root": absolute(config.storage.root),
            "patches": absolute(config.storage.patches or join(config.storage.root, "patches")),
            "features": absolute(config.storage.features or join(config.storage.root, "features")),
        }
    )
    features = None if config.cohort.features is None else absolute(config.cohort.features)
    cohort = config.cohort.model_copy(update={"uri": absolute(config.cohort.uri), "features": features})
    if cohort.megapixel_mnist is not None:
        folder = absolute(cohort.megapixel_mnist.folder)
        images = cohort.megapixel_mnist.model_copy(update={"folder": folder})
        cohort = cohort.model_copy(update={"megapixel_mnist": images})
    root, encoder = storage.root, config.model.encoder
    if encoder.weights is not None:
        encoder = encoder.model_copy(update={"weights": _weights(encoder)})
    model = config.model.model_copy(update={"encoder": encoder})
    tiling, embed = config.tiling, config.embed
    if tiling.coords is not None:
        tiling = tiling.model_copy(update={"coords": absolute(tiling.coords)})
    if tiling.tissue_model is not None:
        network = tiling.tissue_model.model_copy(update={"uri": absolute(tiling.tissue_model.uri)})
        tiling = tiling.model_copy(update={"tissue_model": network})
    if embed is not None and embed.encoder.weights is not None:
        trunk = embed.encoder.model_copy(update={"weights": _weights(embed.encoder)})
        embed = embed.model_copy(update={"encoder": trunk})
    tracking = config.tracking.model_copy(
        update={
            "uri": config.tracking.uri or f"sqlite:///{_database(root)}",
            "experiment": config.tracking.experiment or config.name,
            "model": config.tracking.model or config.name,
        }
    )
    train = config.train
    if train.begins_with is not None:
        train = train.model_copy(update={"begins_with": absolute(train.begins_with)})
    sweep = config.sweep.with_places(absolute) if config.sweep is not None else None
    sections = {"storage": storage, "cohort": cohort, "tiling": tiling, "embed": embed, "model": model, "train": train}
    return config.model_copy(update={**sections, "tracking": tracking, "sweep": sweep})
