"""One process at a time for one piece of work, on any storage: whoever does it says so in a file, again and again.

Nothing here needs a lock of the storage's, for local disks, network disks and clouds have no lock in common; where the
storage writes on a condition (AWS, Google, Azure), a claim replaces only the file that was judged. A claim that is
found is judged by whether its process lives, on this machine, or by whether its beats still come, on another one, so
clocks need not agree. Two that claim at the same moment, or one that was silent for so long that another took over, are
told apart by the token: the last one that wrote it goes on, and the other ends at its next beat or before it writes
(`Lease.check`). A lease that is given back stays as a file that says so: whoever was silent through all of another
one's work must not take the absence of a claim for its own.

Work that several processes may do at once (`joined`: tiling, whose slides are committed one by one) needs the lease
for one thing only: who holds it may take the MLflow runs of the same work for abandoned.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from datetime import UTC, datetime
from pathlib import Path

import psutil

from pipeline.errors import StageError, StorageError
from pipeline.storage.cloud import ChangedError
from pipeline.storage.files import json_bytes, parsed_json, read_tagged, replace

log = logging.getLogger(__name__)

BEAT_S = 5.0
SILENT_S = 40.0  # without a beat after which a process on another machine is taken for dead
_POLL_S = 1.0
_AGAIN_S = 1.0  # after which a file that was not there is looked for once more
_SAME_S = 10.0  # between two readings of when a process began; its id is not given to another one as fast


@dataclass(frozen=True)
class Claim:
    """Who does the work; the JSON of the lease's file."""

    token: str
    host: str
    machine: str
    """Where its process id counts: the boot of the machine, and the container."""
    pid: int
    started: float
    """When the process began, s since 1970: ids are used again."""
    since: str
    """When it claimed the work, UTC."""
    beats: int = 0
    free: bool = False
    """Whether it was given back: the work is anyone's."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@dataclass(frozen=True)
class Lease:
    """A claim as its holder hands it on to those who write for it. Picklable."""

    uri: str
    """Of its file."""
    token: str

    def check(self) -> None:
        """Return where the claim still stands.

        Raises:
            StageError: another process has taken the work over, or even done it; or this one has given it back.
            StorageError: that cannot be found out.
        """
        self.tag()

    def tag(self) -> str | None:
        """That of the file in which the claim stands; errors as `check`."""
        found, tag = _read(self.uri)
        if found is None:  # some S3 servers (rclone) remove the old file before they write the new one
            time.sleep(_AGAIN_S)
            found, tag = _read(self.uri)
        if found is None:
            raise StageError(
                f"{self.uri} is gone, by which other processes know that this one is at work; nothing more is written, "
                "for another one may be at it: run again where none is"
            )
        if found.token != self.token:
            rest = "has ended since: what it did stands" if found.free else "the work goes on there"
            raise StageError(
                f"{self.uri}: {found} has taken this work over while nothing was heard of this one; {rest}, and this "
                "one ends"
            )
        if found.free:
            raise StageError(f"{self.uri}: the run that this process works for has ended; nothing more is written")
        return tag


@contextmanager
def held(uri: str, what: str) -> Iterator[Lease]:
    """The lease on some work, for the duration of a block.

    Args:
        uri: of its file.
        what: the work, for messages.

    Raises:
        StageError: a process that lives holds it. Found out at once on its own machine, elsewhere within `SILENT_S`.
        StorageError: the file cannot be read or written.
    """
    found, tag = _living(uri, what)
    if found is not None:
        raise _taken(uri, what, *found)
    try:
        claim = _begin(uri, tag)
    except ChangedError as other:
        raise StageError(f"{what}: another process claimed it at the same moment ({uri}); it goes on there") from other
    with _claimed(uri, claim) as lease:
        yield lease


def check_free(uri: str, what: str) -> None:
    """Return where no process that lives holds the lease; arguments and errors as `held`."""
    found, _ = _living(uri, what)
    if found is not None:
        raise _taken(uri, what, *found)


@contextmanager
def joined(uri: str, what: str) -> Iterator[Lease | None]:
    """As `held`, for work that several may do at once: None where a process that lives holds the lease.

    Args:
        uri: of its file.
        what: the work, for messages.

    Raises:
        StorageError: the file cannot be read or written.
    """
    found, tag = _living(uri, what)
    if found is not None:
        log.info("%s: %s, is at work on it too", what, found[0])
        yield None
        return
    try:
        claim = _begin(uri, tag)
    except ChangedError:
        log.info("%s: another process has begun it at the same moment", what)
        yield None
        return
    with _claimed(uri, claim) as lease:
        yield lease


def _begin(uri: str, tag: str | None) -> Claim:
    """This process's claim, written in the place of what was judged.

    Raises:
        ChangedError: another process claimed it meanwhile, which the storage told.
    """
    claim = _claim()
    _write(uri, claim, tag)
    return claim


def _write(uri: str, claim: Claim, tag: str | None) -> None:
    """Write a claim in the place of the one of this tag; where the answer to that was lost, it is found there."""
    try:
        replace(uri, json_bytes(asdict(claim)), tag)
    except ChangedError:
        if _read(uri)[0] != claim:
            raise


@contextmanager
def _claimed(uri: str, claim: Claim) -> Iterator[Lease]:
    """The lease, which this process has claimed."""
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(uri, claim, stop), name="lease", daemon=True)
    thread.start()
    try:
        yield Lease(uri, claim.token)
    finally:
        stop.set()
        thread.join()
        _give_back(uri, claim)


def _claim() -> Claim:
    process = psutil.Process()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Claim(uuid.uuid4().hex, socket.gethostname(), _machine(), process.pid, process.create_time(), now)


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116, a link that leads nowhere


def _read(uri: str) -> tuple[Claim | None, str | None]:
    """The claim that is there, and its tag."""
    found = read_tagged(uri)
    return (None, None) if found is None else (Claim(**parsed_json(uri, found[0])), found[1])


def _living(uri: str, what: str) -> tuple[tuple[Claim, str] | None, str | None]:
    """The claim of a process that lives, and how to end it; None as soon as it is sure that there is none.

    With the tag of the file that was judged.
    """
    found, tag = _read(uri)
    if found is None or found.free:
        return None, tag
    if found.machine == _machine():
        if _lives(found):
            return (found, f"stop it (kill {found.pid})"), tag
        log.info("%s: %s, is dead; this run goes on", what, found)
        return None, tag
    log.info("%s: %s, has begun it; %g s to see whether it lives", what, found, SILENT_S)
    deadline = time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        later, tag = _read(uri)
        if later is None or later.free:
            return None, tag
        if later != found:
            return (later, "stop it there"), tag
    log.warning("%s: %s, is silent; this run takes over", what, found)
    return None, tag


def _lives(claim: Claim) -> bool:
    """Whether the claim's process, on this machine, is still there."""
    try:
        process = psutil.Process(claim.pid)
        same = abs(process.create_time() - claim.started) < _SAME_S
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _taken(uri: str, what: str, claim: Claim, remedy: str) -> StageError:
    return StageError(
        f"{what}: {claim}, is at work on it ({uri}); wait until it ends, or {remedy} and run again, which goes on from "
        "what it has done"
    )


def _beat(uri: str, claim: Claim, stop: threading.Event) -> None:
    """Say again and again that the process lives, until it ends or another one has the lease.

    Each beat goes by the tag that it finds: that of the one before is not known where its answer was lost.
    """
    beats, lease = 0, Lease(uri, claim.token)
    while not stop.wait(BEAT_S):
        beats += 1
        try:
            _write(uri, changed(claim, beats=beats), lease.tag())
        except StageError as lost:
            log.error("%s", lost)  # noqa: TRY400, no trace: whoever writes next raises it
            return
        except ChangedError:  # since the check: the next one says by whom
            continue
        except StorageError as away:
            log.warning("%s: not renewed for now (%s)", uri, str(away).splitlines()[0])


def _give_back(uri: str, claim: Claim) -> None:
    """Say in the file that the work is anyone's, unless it is another's by now."""
    try:
        found, tag = _read(uri)
        if found is not None and found.token == claim.token:
            _write(uri, changed(found, free=True), tag)
    except ChangedError:
        return  # another one has it
    except StorageError as away:  # it is found to be a dead process's by the next run
        log.warning("%s: not given back (%s)", uri, str(away).splitlines()[0])
