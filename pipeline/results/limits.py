"""What a host lets those ask for whom it serves: which files, how many slides a request, for how long.

All of it comes from the host's environment, for the model does not know where it is served:

    IPS_ALLOWED_ROOTS   folders and s3:// prefixes, with commas between them. Not set: whatever this process can read
    IPS_MAX_ROWS        slides of one request: 64
    IPS_MAX_SECONDS     after which no further slide of a request is begun: 0.8 of what MLflow's server waits
                        (MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT, 60 s), whose own end of a request is no answer at all

The last two hold for a server, and in a process of one's own (a notebook, a batch job) where they are set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError, StorageError
from pipeline.slides.folders import is_folder, place_of
from pipeline.slides.identity import is_several, slide_files
from pipeline.storage import files, s3

ROOTS, ROWS, SECONDS = "IPS_ALLOWED_ROOTS", "IPS_MAX_ROWS", "IPS_MAX_SECONDS"
_SERVING = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"  # MLflow's server sets it, once it has loaded the model
_TIMEOUT, _TIMEOUT_S = "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "60"
_SHARE = 0.8  # the slide that is begun last takes its time too
_ROWS = "64"


@dataclass(frozen=True)
class Limits:
    """What a host allows."""

    roots: tuple[str, ...] | None = None
    """Absolute paths with links followed, and s3:// prefixes; None: everything."""
    rows: float = float("inf")
    """Slides of one request."""
    seconds: float = float("inf")
    """Of one request, until its last slide is begun."""

    def admit(self, uri: str) -> str:
        """The absolute URI of a slide, all of whose files lie below an allowed root.

        Links are followed: what one leads to must lie there too.

        Raises:
            StorageError: it lies elsewhere; the message does not say whether it exists.
            SlideError: a folder, which holds no slide or several.
        """
        place = place_of(uri)
        if self.roots is None:
            return place
        self._check(place)
        for member in slide_files(place) if is_several(place) or is_folder(place) else ():
            self._check(member)
        return place

    def _check(self, place: str) -> None:
        if not any(_is_below(place, root) for root in self.roots or ()):
            raise StorageError(
                f"{place}: this host does not serve files from there; ask whoever runs it to add its folder, or s3:// "
                f"prefix, to {ROOTS}"
            )


def host_limits(environment: Mapping[str, str] = os.environ) -> Limits:
    """The limits that the environment sets.

    Raises:
        ConfigError: a variable's value is no number above 0, or no place.
    """
    serving, problems = environment.get(_SERVING) == "true", []
    seconds = f"{_SHARE * float(environment.get(_TIMEOUT, _TIMEOUT_S)):g}"
    found = {}
    for name, default in ((ROWS, _ROWS), (SECONDS, seconds)):
        text = environment.get(name, default if serving else "inf")
        found[name] = _number(text)
        if not found[name] > 0:
            problems.append(f"{name}: {text!r} is no number above 0")
    try:
        roots = _roots(environment.get(ROOTS))
    except StorageError as error:
        problems.append(f"{ROOTS}: {error}")
    if problems:
        raise ConfigError("environment", problems)
    return Limits(roots, found[ROWS], found[SECONDS])


def _roots(text: str | None) -> tuple[str, ...] | None:
    """Not set: everything; set, but empty: nothing."""
    if text is None:
        return None
    places = [files.absolute(entry.strip()) for entry in text.split(",") if entry.strip()]
    return tuple(place if files.is_remote(place) else _real(place) for place in places)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _real(path: str) -> str:
    return str(Path(path).resolve())


def _is_below(place: str, root: str) -> bool:
    """Both absolute. Keys are compared as they are, and one with `..` in it, which a server may resolve, is nowhere."""
    if files.is_remote(place) != files.is_remote(root):
        return False
    if not files.is_remote(place):
        return Path(_real(place)).is_relative_to(root)
    if place.partition("://")[0] != root.partition("://")[0]:  # both absolute, so of small letters
        return False
    key, prefix = s3.key(place), s3.key(root)
    return not {".", ".."} & set(key.split("/")) and (key == prefix or key.startswith(f"{prefix}/"))
