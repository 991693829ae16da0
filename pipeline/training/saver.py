"""The checkpoints of one training run, where it keeps them: written while the training goes on, found after any end.

`<run folder>/step-00000042/` counts once its `checkpoint.json` stands, which is written last and names the size and
digest of every file; whatever a killed writer left without it is passed over, and removed by the next one. Ray
Train's own list of checkpoints is not used: its controller learns of one up to 2 s after it is written, so a kill in
between loses it, and the list refuses to load when one of its folders was removed by hand.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipeline.errors import DamagedError, StageError, StorageError
from pipeline.model.checkpoint import STATE, Progress, Snapshot, load_checkpoint, write_snapshot
from pipeline.model.folder import CONFIG, WEIGHTS
from pipeline.storage.files import (
    delete,
    download,
    join,
    list_names,
    list_versions,
    read_json,
    upload,
    write_json,
)
from pipeline.storage.scratch import scratch_folder
from pipeline.storage.tree import delete_folder

log = logging.getLogger(__name__)

COMMIT = "checkpoint.json"
_VERSION = 1
_KEEP = 2  # checkpoints of a run, the best one aside: the last, and the one before it while the next is written
_FILES = (WEIGHTS, CONFIG, STATE)


class Saver:
    """Writes snapshots into a run's folder, one at a time, in a thread of its own.

    What a write raises is raised by the next `save`, or when the block ends.

    Args:
        folder: of the run.
        allowed: called before anything in it is changed; raises where that is no longer this run's to do.
    """

    def __init__(self, folder: str, allowed: Callable[[], None] = lambda: None) -> None:
        self._folder, self._allowed = folder, allowed
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a write is under way; `save` would wait for it."""
        return self._last is not None and not self._last.done()

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write; waits for the write before this one."""
        self.wait()
        self._last = self._pool.submit(_save, self._folder, snapshot, self._allowed)

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


def newest(folder: str, *, read: bool = False) -> Progress | None:
    """Of the newest whole checkpoint in a run's folder; None when there is none.

    Args:
        folder: of the run.
        read: whether to read the files and compare their digests; else their sizes are looked at.

    Raises:
        StageError: it was written by another version of the pipeline, or the best one that it names is gone.
        StorageError: the folder cannot be read.
    """
    harmed: list[str] = []
    for name in sorted(_names(folder), reverse=True):
        commit = _commit(folder, name)
        if commit is None:
            continue
        harm = _harm(folder, name, commit, read=read)
        if harm is None:
            progress = _progress(folder, name, commit)
            _check_best(folder, progress, read=read)
            _warn(harmed, f"{name}, the checkpoint before it, is used")
            return progress
        harmed.append(f"{join(folder, name)}: {harm}")
    _warn(harmed, "there is no whole checkpoint before it, so the training begins anew")
    return None


def _warn(harmed: Sequence[str], what: str) -> None:
    for harm in harmed:
        log.warning("%s; %s", harm, what)


def progress_of(folder: str, name: str) -> Progress:
    """Of one checkpoint in a run's folder.

    Raises:
        StageError: it was written by another version of the pipeline.
        StorageError: it cannot be read.
    """
    return _progress(folder, name, _read(folder, name))


def restore(
    folder: str,
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan_digest: str,
    take_winners: Callable[[Mapping[str, Tensor] | None], None] | None = None,
) -> Progress:
    """Load a checkpoint of a run's folder into the model and its optimiser; `take_winners` as `load_checkpoint`.

    Raises:
        StageError: it follows another plan, is no training state, or lacks winners that are asked for.
        StorageError: it cannot be read, or was damaged since `newest` read it: begun again, that finds another.
    """
    with scratch_folder() as scratch:
        try:
            _fetch(join(folder, name), _read(folder, name), _FILES, scratch)
        except DamagedError as error:
            raise StorageError(str(error)) from error
        try:
            return load_checkpoint(scratch, model, optimizer, plan_digest, take_winners)
        except StageError as error:
            raise StageError(str(error).replace(str(scratch), join(folder, name))) from error


@contextmanager
def model_folder(checkpoint: str) -> Iterator[Path]:
    """Weights and config of a checkpoint, given by URI, as local files.

    Raises:
        StageError: they are gone, or not what the training wrote.
    """
    folder, _, name = checkpoint.rpartition("/")
    remedy = (
        f"restore it from a copy, or remove {checkpoint} and run again: the training goes on from the checkpoint "
        "before it, and says so where it cannot"
    )
    commit = _commit(folder, name)
    if commit is None:
        raise StageError(f"{join(checkpoint, COMMIT)} is gone; {remedy}")
    with scratch_folder() as scratch:
        try:
            _fetch(checkpoint, commit, (WEIGHTS, CONFIG), scratch)
        except DamagedError as error:
            raise StageError(f"{error}; {remedy}") from error
        yield scratch


def _fetch(uri: str, commit: dict[str, Any], names: Sequence[str], target: Path) -> None:
    """Copy files of a checkpoint to a local folder; DamagedError where one is not as it was written."""
    for name in names:
        download(join(uri, name), target / name)
        if _digest(target / name) != commit["files"][name]["sha256"]:
            raise DamagedError(f"{join(uri, name)}: damaged, its digest is not that of {COMMIT}")


def _save(folder: str, snapshot: Snapshot, allowed: Callable[[], None]) -> None:
    name = snapshot.progress.name
    uri = join(folder, name)
    allowed()
    delete(join(uri, COMMIT))  # there where a damaged checkpoint is written again: it must not vouch for half of both
    with scratch_folder() as local:
        write_snapshot(local, snapshot)
        for file in _FILES:
            upload(local / file, join(uri, file))
        files = {file: {"bytes": (local / file).stat().st_size, "sha256": _digest(local / file)} for file in _FILES}
    allowed()
    write_json(join(uri, COMMIT), {"version": _VERSION, "progress": asdict(snapshot.progress), "files": files})
    allowed()  # that write may have waited for minutes; what is newer by now is another run's
    _prune(folder, name)


def _prune(folder: str, newest_name: str) -> None:
    """Remove what is older than the newest checkpoint, but for the one before it and the best, and what is newer.

    Newer ones are unfinished, or damaged ones that the run has gone back behind.
    """
    names = sorted(_names(folder))
    commits = {name: commit for name in names if name <= newest_name and (commit := _commit(folder, name)) is not None}
    kept = sorted(commits)[-_KEEP:]
    kept += [commits[name]["progress"]["best"] for name in kept]
    for name in names:
        if name not in kept:
            delete(join(folder, name, COMMIT))  # first: half a checkpoint must not count
            delete_folder(join(folder, name))


def _names(folder: str) -> list[str]:
    return [name for name in list_names(folder) if name.startswith("step-")]


def _commit(folder: str, name: str) -> dict[str, Any] | None:
    """What `checkpoint.json` says; None where it is absent, or damaged."""
    try:
        return _read(folder, name) if COMMIT in list_names(join(folder, name)) else None
    except DamagedError as error:
        log.warning("%s", error)
        return None


def _read(folder: str, name: str) -> dict[str, Any]:
    commit: dict[str, Any] = read_json(join(folder, name, COMMIT))
    if commit.get("version") != _VERSION:
        raise _foreign(folder, name, f"checkpoint of version {commit.get('version')}, this is version {_VERSION}")
    return commit


def _progress(folder: str, name: str, commit: dict[str, Any]) -> Progress:
    """As the commit has it; StageError where its fields are others than this version's."""
    try:
        return Progress(**commit["progress"])
    except (KeyError, TypeError) as error:
        raise _foreign(folder, name, f"checkpoint of another version ({error})") from error


def _foreign(folder: str, name: str, what: str) -> StageError:
    return StageError(
        f"{join(folder, name, COMMIT)}: {what}; go on with the release that wrote it, or remove {folder} to train anew"
    )


def _harm(folder: str, name: str, commit: dict[str, Any], *, read: bool) -> str | None:
    """What is wrong with a file of the checkpoint; None where it is whole."""
    there = list_versions(join(folder, name))
    for file, facts in commit["files"].items():
        version = there.get(file)
        if version is None or version.size != facts["bytes"]:
            return f"{file} is gone or truncated"
    if read:
        with scratch_folder() as scratch:
            try:
                _fetch(join(folder, name), commit, _FILES, scratch)
            except DamagedError as error:
                return str(error)
    return None


def _check_best(folder: str, progress: Progress, *, read: bool) -> None:
    """StageError where the best checkpoint, which may be the result, is gone: no later one could stand for it."""
    best = progress.best
    if best is None or best == progress.name:
        return
    commit = _commit(folder, best)
    harm = f"{COMMIT} is gone" if commit is None else _harm(folder, best, commit, read=read)
    if harm is not None:
        raise StageError(
            f"{join(folder, best)}: of the best checkpoint so far, {harm}; restore it, or remove {folder} to train anew"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
