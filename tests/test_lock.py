"""The lock file against pyproject.toml: an image built from it must not meet a version that was never tested."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_ROOT = Path(__file__).resolve().parents[1]


def _locked() -> dict[str, str]:
    lines = (_ROOT / "requirements.lock").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def _dependencies() -> list[Requirement]:
    return [
        Requirement(line) for line in tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]


@pytest.mark.parametrize("dependency", _dependencies(), ids=lambda dependency: dependency.name)
def test_every_dependency_is_locked_at_a_version_that_suits(dependency: Requirement) -> None:
    version = _locked().get(canonicalize_name(dependency.name))
    assert version is not None, "the lock does not name it"
    assert dependency.specifier.contains(version)
