"""Where MLflow's files lie: its store names each place by its full path, which a folder that is moved does not keep."""

from __future__ import annotations

import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit


def missing(uri: str, place: str) -> str | None:
    """Why a place of MLflow's files cannot be used, and what would help; None where it is there, or not on a disk.

    Args:
        uri: of the store that names it.
        place: as the store has it, a path or URI.
    """
    split = urlsplit(place.replace("?", "%3F").replace("#", "%23"))
    if split.scheme not in ("", "file"):
        return None
    path = Path(unquote(split.path)) if split.scheme else Path(place)
    if path.exists() or path.parent.exists():  # the last folder is made when something is first put there
        return None
    gone = f"MLflow at {uri} keeps these files at {path}, which is gone"
    folder = Path(uri.partition(":///")[2]).parent
    old = _was(folder, path) if uri.startswith("sqlite") else None
    if old is None:
        return f"{gone}; bring it back"
    link = shlex.join(["ln", "-s", str(folder), str(old)])
    return f"{gone}: {old} is {folder} now; move it back, or link it: {link}"


def _was(folder: Path, path: Path) -> Path | None:
    """Where a folder was when `path` lay in it; None where it holds nothing that the path's end names."""
    for place in range(1, len(path.parts)):
        if (folder / Path(*path.parts[place:])).exists():
            return Path(*path.parts[:place])
    return None
