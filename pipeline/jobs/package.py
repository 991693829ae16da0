"""What travels with a job: the working directory without data, caches and credentials, listed before it is sent."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray._private.runtime_env.packaging import _dir_travel, _get_excludes, get_uri_for_directory

from pipeline.credentials import secret_within
from pipeline.errors import ConfigError

_SLIDES = (
    *("svs", "tif", "tiff", "ndpi", "vms", "vmu", "scn", "mrxs", "svslide", "bif", "czi", "dcm", "qptiff"),
    *("arrow", "h5", "hdf5", "npy", "npz", "zarr", "safetensors", "pt", "pth", "ckpt", "db", "sqlite"),
)
DATA = (
    *(f"*.{end}" for suffix in _SLIDES for end in (suffix, suffix.upper())),
    *("/runs/", "/predictions/", "mlruns/", "mlartifacts/"),
)
"""Slides, stores, weights and databases: the job reads them where they are. As in .gitignore."""
CREDENTIALS = (
    *(".env", ".env.*", ".netrc", ".pgpass", ".aws/", ".ssh/", ".kube/", "id_rsa*", "id_ed25519*", "auth_token"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "credentials", "credentials.json", "kubeconfig"),
)
CACHES = (".git/", ".venv/", "venv/", "__pycache__/", "*.egg-info/", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/")
EXCLUDES = (*DATA, *CREDENTIALS, *CACHES)
_NAMED = 5  # of the largest files, in a refusal


@dataclass(frozen=True)
class Package:
    """A folder as Ray would pack it, by the rules of `.gitignore` and `.rayignore` in it, and by `EXCLUDES`."""

    folder: Path
    files: Mapping[str, int]
    """Path in the folder -> bytes, the largest first."""
    kept_back: Mapping[str, int]
    """The same of data and credentials, which no ignore file had named."""
    digest: str
    """Of all names and bytes."""

    @property
    def bytes(self) -> int:
        """Before compression."""
        return sum(self.files.values())


def look_at(folder: Path, limit_mb: float, environment: Mapping[str, str]) -> Package:
    """What of a folder would travel.

    Args:
        folder: the working directory of the job.
        limit_mb: megabytes that may travel.
        environment: no value of a secret variable in it may stand in a file that travels.

    Raises:
        ConfigError: too much would travel, or a file holds a secret; the largest files, or the secret's file and the
            variable's name are told.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise ConfigError(f"the working directory {folder}", ["is no folder"])
    files, everything = _sizes(folder, EXCLUDES), _sizes(folder, CACHES)
    kept_back = {name: size for name, size in everything.items() if name not in files}
    package = Package(folder, files, kept_back, "")
    if package.bytes > limit_mb * 1e6:
        largest = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in list(files.items())[:_NAMED])
        raise ConfigError(
            f"the working directory {folder}",
            [
                f"{package.bytes / 1e6:.1f} MB would travel with the job, and deploy.package_mb={limit_mb:g} may; the "
                f"largest: {largest}. Name what the job does not need in .rayignore, submit from another folder "
                "(--working-dir), or raise deploy.package_mb"
            ],
        )
    problems = [problem for name in files if (problem := _secret_in(folder / name, environment)) is not None]
    if problems:
        raise ConfigError(f"the working directory {folder}", problems)
    digest = get_uri_for_directory(str(folder), include_gitignore=True, excludes=list(EXCLUDES))
    return Package(folder, files, kept_back, Path(digest).stem)


def _sizes(folder: Path, excludes: Sequence[str]) -> dict[str, int]:
    """Bytes of the files that Ray would pack with these excludes, the largest first. Links count as what they lead to.

    Raises ConfigError where a file cannot be read.
    """
    found: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            found[str(path.relative_to(folder))] = path.stat().st_size
            if not os.access(path, os.R_OK):
                raise ConfigError(f"the working directory {folder}", [f"{path.name} cannot be read"])

    matches: list[Callable[[Path], bool]] = [_get_excludes(folder, list(excludes))]
    _dir_travel(folder, matches, note, include_gitignore=True)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _secret_in(path: Path, environment: Mapping[str, str]) -> str | None:
    """Why a file may not travel; its text is not repeated."""
    variable = secret_within(path.read_bytes().decode(errors="replace"), environment)
    if variable is None:
        return None
    return f"{path.name} holds the value of {variable}, and what travels is kept by Ray; take it out of {path}"
