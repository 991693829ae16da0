"""The tile stage on Ray Data: slides of a cohort to committed slides of a patch store.

One row is one slide reference; pixels never pass through Ray's object store. Each task reads one slide, writes
it to the store and returns its status, so a bad slide costs that slide. The tasks load no torch.
"""

from __future__ import annotations

import pickle
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.cohort import CohortSlide
from pipeline.config_data import TilingConfig
from pipeline.errors import SlideError, StorageError
from pipeline.identity import slide_digest
from pipeline.patches import PatchStore, SlideStatus, slide_key
from pipeline.slide import open_slide
from pipeline.storage import SourceVersion
from pipeline.tiling import PatchRow, effective_mpp, tile_slide

TRANSIENT = frozenset({"missing", "directory", "source", "changed", "crash"})
"""Reasons that say nothing about the slide's content: they are not recorded, and tried again by the next run."""

STATUS_THREADS = 16  # look-ups wait on the storage, not on the CPU
MAX_ATTEMPTS = 3  # on one node, at a slide whose process is killed
MAX_BLOCKS = 4096  # Ray Data tasks of one job; beyond, a task tiles several slides in turn


def tile_cohort(
    slides: Sequence[CohortSlide],
    spec: TilingConfig,
    store: str,
    *,
    cpus: float,
    on_status: Callable[[SlideStatus], None],
) -> list[SlideStatus]:
    """Tile the slides that the store does not know yet; statuses come back in the order of `slides`.

    Ray must be initialised, unless every slide is known already. Each slide is committed on its own: after an
    interruption the next call goes on with the rest.

    Args:
        slides: rows of the cohort; two with the same content become one stored slide.
        spec: how to tile.
        store: root of the patch store.
        cpus: CPUs that Ray reserves for each task.
        on_status: called for every slide, known ones first, then as they are finished.

    Raises:
        StorageError: the store itself cannot be read or written, or no slide at all can be reached (wrong
            credentials, server down).
    """
    patches = PatchStore(store, spec.fingerprint())
    with ThreadPoolExecutor(STATUS_THREADS) as pool:
        statuses = list(pool.map(lambda slide: _known(slide, patches), slides))
    known = [status for status in statuses if status is not None]
    unreachable = [status for status in known if status.reason is not None and status.reason.startswith("source: ")]
    if unreachable and len(unreachable) == len(slides):
        raise StorageError(f"no slide can be reached; the first one: {known[0].reason}")
    for status in known:
        on_status(status)
    pending = [number for number, status in enumerate(statuses) if status is None]
    for number, status in _run([(number, slides[number]) for number in pending], spec, store, cpus):
        statuses[number] = status
        on_status(status)
    return [status for status in statuses if status is not None]


def store_slide(slide: CohortSlide, spec: TilingConfig, store: str) -> SlideStatus:
    """Tile one slide into the store, here and now; whatever is wrong with it becomes its status.

    Raises:
        StorageError: the store itself cannot be read or written.
    """
    patches = PatchStore(store, spec.fingerprint())
    try:
        version = _version(slide)
    except SlideError as error:
        return _quarantined(slide, error.reason, error)
    try:
        status = _commit(slide, version, spec, patches)
    except SlideError as error:
        status = _quarantined(slide, error.reason, error)
        if error.reason in TRANSIENT:
            return status
    except StorageError:
        raise  # the store's: what concerns the slide is a SlideError by now
    except Exception as error:  # one slide's unforeseen failure must not end the others' run
        return _quarantined(slide, "crash", error)
    patches.record(slide, version, status)
    return status


def _commit(slide: CohortSlide, version: SourceVersion, spec: TilingConfig, patches: PatchStore) -> SlideStatus:
    if version.size == 0:
        raise SlideError("empty-file", f"{slide.uri}: zero bytes; copy the slide again")
    with ExitStack() as stack:
        with _reading(slide):
            digest = slide_digest(slide.uri)
            path = stack.enter_context(storage.local_copy(slide.uri))
        reader = stack.enter_context(open_slide(path))
        mpp = effective_mpp(reader.mpp, spec, slide.mpp)
        key = slide_key(digest, mpp)
        if patches.has(key):
            stored = patches.slide(key)
        else:
            tiling = tile_slide(reader, spec, mpp)
            stored = patches.write(digest, mpp, reader, tiling, _unchanged(tiling.rows(), slide, version))
    n_patches, n_bad_tiles = stored.n_patches, stored.n_bad_tiles
    return SlideStatus(slide.slide_id, slide.uri, key, "committed", None, n_patches, n_bad_tiles)


def _unchanged(rows: Iterator[PatchRow], slide: CohortSlide, version: SourceVersion) -> Iterator[PatchRow]:
    """The rows; fails before the commit when the slide was replaced while it was read."""
    yield from rows
    if _version(slide) != version:
        raise SlideError("changed", f"{slide.uri}: the file was replaced while it was read; run again")


def _known(slide: CohortSlide, patches: PatchStore) -> SlideStatus | None:
    """The status of a slide that needs no work: done before, or out of reach."""
    try:
        version = _version(slide)
    except SlideError as error:
        return _quarantined(slide, error.reason, error)
    return patches.status(slide, version)


def _version(slide: CohortSlide) -> SourceVersion:
    with _reading(slide):
        return storage.source_version(slide.uri)


@contextmanager
def _reading(slide: CohortSlide) -> Iterator[None]:
    """Tell a slide that cannot be reached (a SlideError) from a store that cannot (a StorageError)."""
    try:
        yield
    except StorageError as error:
        match error.__cause__:
            case FileNotFoundError():
                reason = "missing"
            case IsADirectoryError():
                reason = "directory"
            case _:
                reason = "source"
        raise SlideError(reason, str(error)) from error


def _quarantined(slide: CohortSlide, reason: str, error: Exception) -> SlideStatus:
    message = f"{reason}: {error}" if str(error) else f"{reason}: {type(error).__name__}"
    trace = "".join(traceback.format_exception(error))
    return SlideStatus(slide.slide_id, slide.uri, None, "quarantined", message, error=trace)


def _run(
    work: Sequence[tuple[int, CohortSlide]], spec: TilingConfig, store: str, cpus: float
) -> Iterator[tuple[int, SlideStatus]]:
    """Tile the numbered slides on Ray; results come as they are finished."""
    if not work:
        return
    import ray.data  # loads for seconds, and a complete store needs none of it

    run = uuid.uuid4().hex
    items = [{"number": number, "slide": pickle.dumps(slide)} for number, slide in work]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS)).map(
        _tile_row, fn_kwargs={"spec": spec, "store": store, "run": run}, num_cpus=cpus
    )
    for row in dataset.iter_rows():
        if row["failure"] is not None:
            raise StorageError(row["failure"])
        yield row["number"], pickle.loads(row["status"])


def _tile_row(row: dict[str, Any], spec: TilingConfig, store: str, run: str) -> dict[str, Any]:
    """One Ray Data row to another; a failing store is data here, so that Ray neither retries nor wraps it."""
    slide: CohortSlide = pickle.loads(row["slide"])
    try:
        with _attempt(f"{run}-{row['number']}") as attempts:
            if attempts > MAX_ATTEMPTS:
                killed = RuntimeError(f"{slide.uri}: its process was killed {MAX_ATTEMPTS} times; is memory short?")
                status = _quarantined(slide, "crash", killed)
            else:
                status = store_slide(slide, spec, store)
    except StorageError as error:
        return {"number": row["number"], "status": b"", "failure": str(error)}
    return {"number": row["number"], "status": pickle.dumps(status), "failure": None}


@contextmanager
def _attempt(name: str) -> Iterator[int]:
    """The number of this attempt on this node, from 1.

    Ray retries a task whose process dies (segmentation fault, out of memory) without end, so one slide could hold
    the whole run for ever; a file outlives the process and counts.
    """
    path = Path(tempfile.gettempdir()) / f"ips-tile-{name}"
    with path.open("ab") as file:
        file.write(b".")
    yield path.stat().st_size
    path.unlink()
