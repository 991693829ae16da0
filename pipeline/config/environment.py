"""What a config may take from the environment: `${oc.env:SCRATCH}`, but no secret, since configs are recorded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf
from omegaconf.resolvers.oc import env

from pipeline.credentials import is_secret_variable, secret_within


@contextmanager
def checked_environment() -> Iterator[None]:
    """Inside, `${oc.env:NAME}` of a variable that is called a secret is refused instead of resolved."""
    OmegaConf.register_new_resolver("oc.env", _variable, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", env, replace=True)


def secrets_copied(given: Mapping[str, Any]) -> list[str]:
    """One sentence for every value of a config that holds that of a secret variable, however it came there."""
    return [
        f"{path}: holds the value of the environment variable {variable}, a secret by its name, and a config is "
        "recorded; take it out, and leave it in the environment"
        for path, text in _texts(given, "")
        if (variable := secret_within(text, os.environ)) is not None
    ]


def _variable(name: str, *default: str | None) -> str | None:
    if is_secret_variable(name):
        raise ValueError(
            f"${{oc.env:{name}}} would record a secret; take it out: MLflow, S3 and PostgreSQL find theirs in the "
            "environment by themselves"
        )
    return env(name, *default)


def _texts(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Every text of a tree, with its dotted path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, f"{path}.{number}")
