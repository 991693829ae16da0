"""The checkpoints of one training run, where it keeps them: written while the training goes on, found after any end.

`<run folder>/step-00000042/` counts once its `checkpoint.json` stands, which is written last and names the size and
digest of every file; whatever a killed writer left without it is passed over, and removed by the next one. Ray
Train's own list of checkpoints is not used: its controller learns of one up to 2 s after it is written, so a kill in
between loses it, and the list refuses to load when one of its folders was removed by hand.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from pipeline.checkpoint import CONFIG, STATE, WEIGHTS, Progress, Snapshot, load_checkpoint, write_snapshot
from pipeline.errors import StageError
from pipeline.storage import (
    delete,
    delete_folder,
    download,
    join,
    list_names,
    list_versions,
    read_json,
    upload,
    write_json,
)

log = logging.getLogger(__name__)

COMMIT = "checkpoint.json"
_VERSION = 1
_KEEP = 2  # checkpoints of a run, the best one aside: the last, and the one before it while the next is written
_FILES = (WEIGHTS, CONFIG, STATE)


class Saver:
    """Writes snapshots into a run's folder, one at a time, in a thread of its own.

    What a write raises is raised by the next `save`, or when the block ends.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a write is under way; `save` would wait for it."""
        return self._last is not None and not self._last.done()

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write; waits for the write before this one."""
        self.wait()
        self._last = self._pool.submit(_save, self._folder, snapshot)

    def wait(self) -> None:
        """Return when everything is written; StorageError when it cannot be."""
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Finish the write under way; where the block raised, its own exception goes on."""
        self._pool.shutdown()
        if error is None:
            self.wait()


def newest(folder: str) -> Progress | None:
    """Of the newest whole checkpoint in a run's folder; None when there is none.

    Raises:
        StageError: it was written by another version of the pipeline, or the best one that it names is gone.
        StorageError: the folder cannot be read.
    """
    for name in sorted(_names(folder), reverse=True):
        commit = _commit(folder, name)
        if commit is None:
            continue
        lost = _lost(folder, name, commit)
        if lost is None:
            progress = Progress(**commit["progress"])
            _check_best(folder, progress)
            return progress
        log.warning("%s: %s is gone or truncated; the checkpoint before it is used", join(folder, name), lost)
    return None


def restore(folder: str, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, plan_digest: str) -> Progress:
    """Load a checkpoint of a run's folder into the model and its optimiser.

    Raises:
        StageError: it is damaged, or follows another plan.
    """
    with _local(join(folder, name), _read(folder, name)) as local:
        return load_checkpoint(local, model, optimizer, plan_digest)


@contextmanager
def _local(uri: str, commit: dict[str, Any]) -> Iterator[Path]:
    """The checkpoint's files on this machine, as they were written."""
    with tempfile.TemporaryDirectory(prefix="ips-") as scratch:
        for name, facts in commit["files"].items():
            file = Path(scratch) / name
            download(join(uri, name), file)
            if _digest(file) != facts["sha256"]:
                raise StageError(f"{join(uri, name)}: damaged; remove {uri}, and the checkpoint before it is used")
        yield Path(scratch)


def _save(folder: str, snapshot: Snapshot) -> None:
    uri = join(folder, snapshot.progress.name)
    with tempfile.TemporaryDirectory(prefix="ips-") as scratch:
        local = Path(scratch)
        write_snapshot(local, snapshot)
        for name in _FILES:
            upload(local / name, join(uri, name))
        files = {name: {"bytes": (local / name).stat().st_size, "sha256": _digest(local / name)} for name in _FILES}
    write_json(join(uri, COMMIT), {"version": _VERSION, "progress": asdict(snapshot.progress), "files": files})
    _prune(folder)


def _prune(folder: str) -> None:
    """Remove what is older than the newest checkpoint, but for the one before it and the best."""
    names = sorted(_names(folder))
    commits = {name: commit for name in names if (commit := _commit(folder, name)) is not None}
    kept = sorted(commits)[-_KEEP:]
    kept += [commits[name]["progress"]["best"] for name in kept]
    for name in names[: names.index(max(commits))]:
        if name not in kept:
            delete(join(folder, name, COMMIT))  # first: half a checkpoint must not count
            delete_folder(join(folder, name))


def _names(folder: str) -> list[str]:
    return [name for name in list_names(folder) if name.startswith("step-")]


def _commit(folder: str, name: str) -> dict[str, Any] | None:
    """What `checkpoint.json` says; None where it is absent."""
    return _read(folder, name) if COMMIT in list_names(join(folder, name)) else None


def _read(folder: str, name: str) -> dict[str, Any]:
    uri = join(folder, name, COMMIT)
    commit: dict[str, Any] = read_json(uri)
    if commit.get("version") != _VERSION:
        raise StageError(
            f"{uri}: checkpoint of version {commit.get('version')}, this is version {_VERSION}; go on with the "
            f"release that wrote it, or remove {folder} to train anew"
        )
    return commit


def _lost(folder: str, name: str, commit: dict[str, Any]) -> str | None:
    """A file of the checkpoint that is gone or truncated; None where it is whole."""
    there = list_versions(join(folder, name))
    for file, facts in commit["files"].items():
        version = there.get(file)
        if version is None or version.size != facts["bytes"]:
            return str(file)
    return None


def _check_best(folder: str, progress: Progress) -> None:
    """StageError where the best checkpoint, which may be the result, is gone: no later one could stand for it."""
    best = progress.best
    if best is None or best == progress.name:
        return
    commit = _commit(folder, best)
    if commit is None or _lost(folder, best, commit) is not None:
        raise StageError(
            f"{join(folder, best)}: the best checkpoint so far is gone or truncated; restore it, or remove {folder} to "
            "train anew"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
