"""How a submitted command ended, by its own word: a JSON file below the root, which outlives the cluster.

Ray tells of a job that it failed, not how: every exit code but 0 is FAILED, and where the head is lost nothing is told.
So the driver itself writes its exit code as the last thing it does, and whoever submitted it reads that first.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from pipeline.credentials import masked
from pipeline.errors import PipelineError, StorageError
from pipeline.logs import context
from pipeline.storage.files import join, read_if_there, write_json

log = logging.getLogger(__name__)

RECORD, NONCE = "IPS_JOB_RECORD", "IPS_JOB_NONCE"
"""Variables of the driver: the record's URI, and what tells this job from one of the same id on another cluster."""
_REASON_CHARS = 2000


@dataclass(frozen=True)
class Result:
    """How a driver ended; the JSON of `<root>/jobs/<submission id>.json`."""

    nonce: str
    code: int
    """Its exit code."""
    reason: str
    """Its error's message; empty where all went well."""
    run_id: str | None
    """The MLflow run of the invocation; None where no stage had to run."""
    started: float
    """Seconds since 1970."""
    finished: float


def record_uri(root: str, submission_id: str) -> str:
    """Where a job's record stands."""
    return join(root, "jobs", f"{submission_id}.json")


def read_result(uri: str, nonce: str) -> Result | None:
    """The record, if this very job has written it; None where it has not, or cannot be seen from here."""
    try:
        found = read_if_there(uri)
    except StorageError as error:
        log.warning("submit: the job's record cannot be read for now (%s)", str(error).splitlines()[0])
        return None
    result = None if found is None else Result(**json.loads(found))
    return result if result is not None and result.nonce == nonce else None


@contextmanager
def recorded() -> Iterator[None]:
    """Inside, the program of a submitted job; how it ends is written down. Nothing where it is no such job's.

    What the block raises goes on; a storage that does not take the record costs a warning.
    """
    uri, nonce = os.environ.pop(RECORD, None), os.environ.pop(NONCE, "")  # not for the programs that this one starts
    if uri is None:
        yield
        return
    started, ended = time.time(), (0, "")
    try:
        yield
    except BaseException as error:
        ended = _told(error)
        raise
    finally:
        run_id = context().get("run")
        result = Result(nonce, *ended, None if run_id is None else str(run_id), started, time.time())
        try:
            write_json(uri, asdict(result))
        except StorageError as error:
            log.warning("the job's record was not written: %s", error)


def _told(error: BaseException) -> tuple[int, str]:
    """Exit code and reason of what ended the program: the error behind `SystemExit`, which click makes of it."""
    code: object = error.code if isinstance(error, SystemExit) else 1
    found: BaseException | None = error
    said = ""
    while found is not None:
        if isinstance(found, PipelineError):
            said = str(found)
            break
        if not isinstance(found, SystemExit) and str(found) not in ("", str(code)):  # click's Exit says its code alone
            said = said or f"{type(found).__name__}: {found}"
        found = found.__cause__ or found.__context__
    number = code if isinstance(code, int) else 0 if code is None else 1
    return number, masked(said)[:_REASON_CHARS] if number else ""
