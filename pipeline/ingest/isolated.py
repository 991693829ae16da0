"""The tiler's work on a slide in a process of its own, which the slide may break or overcharge at its own cost alone.

Nothing of a slide's pixels is read by the process that asks: not by a task of the tile stage, not by `predict`, not by
a server. Patches come back through the store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.ingest import child, tiler
from pipeline.ingest.balance import share_count, shares
from pipeline.ingest.source import version_of
from pipeline.ingest.tiler import LargeSlide, ReadSlide, finish_slide, quarantined
from pipeline.storage.attempts import MAX_ATTEMPTS
from pipeline.storage.files import SourceVersion
from pipeline.store.catalogue import Row
from pipeline.store.parts import part_count
from pipeline.store.patches import PatchStore, SlideStatus

Result = TypeVar("Result")


def store_slide(slide: CohortSlide, spec: TilingConfig, store: str) -> SlideStatus:
    """As `tiler.store_slide`, a large slide share by share.

    Raises:
        StorageError: the store itself cannot be read or written.
    """
    begun = begin_slide(slide, spec, store)
    if isinstance(begun, SlideStatus):
        return begun
    parts = part_count(begun.planned.tiling)
    for share in shares(parts, share_count(parts, begun.planned.tiling.grid.patch_px)):
        failed = store_share(begun.share(share), share, spec, store)
        if failed is not None:
            return failed
    return finish_slide(begun, spec, store)


def begin_slide(slide: CohortSlide, spec: TilingConfig, store: str, *, pixels: bool = True) -> SlideStatus | LargeSlide:
    """As `tiler.begin_slide`, of a slide that several tasks may share."""
    patches = PatchStore(store, spec.fingerprint())
    try:
        version = version_of(slide, spec)
    except SlideError as error:
        return quarantined(slide, error.reason, error)
    work = partial(tiler.begin_slide, slide, spec, store, whole=False, pixels=pixels)
    found, rows = _guarded(slide, version, spec, patches, work)
    patches.append(rows)
    return found


def read_slide(
    slide: CohortSlide, version: SourceVersion, spec: TilingConfig, store: str, *, pixels: bool
) -> tuple[SlideStatus | LargeSlide | ReadSlide, list[Row]]:
    """As `tiler.read_slide`, of a file that is known to be in this version."""
    work = partial(tiler.read_slide, slide, version.size, spec, store, pixels=pixels)
    found, rows = _guarded(slide, version, spec, PatchStore(store, spec.fingerprint()), work)
    return (found, rows) if isinstance(found, SlideStatus) else found


def store_share(large: LargeSlide, parts: range, spec: TilingConfig, store: str) -> SlideStatus | None:
    """As `tiler.store_share`."""
    work = partial(tiler.store_share, large, parts, spec, store)
    patches = PatchStore(store, spec.fingerprint())
    status, rows = _guarded(large.slide, large.version, spec, patches, work, large.planned.key)
    tiler.give_up(large, spec, patches, rows)
    return status


def _guarded(
    slide: CohortSlide,
    version: SourceVersion,
    spec: TilingConfig,
    patches: PatchStore,
    work: Callable[[], Result],
    left: str | None = None,
) -> tuple[Result | SlideStatus, list[Row]]:
    """What the work gives; where its process ended, the slide's status, with rows for it if it was too expensive.

    `left` is the key under which the slide left files.
    """
    try:
        return apart(slide, spec, work), []
    except SlideError as error:
        status = quarantined(slide, error.reason, error)
        if error.reason != tiler.TOO_EXPENSIVE:
            return status, []
        status = replace(status, limits=(spec.max_seconds, spec.max_slide_gib))
        return status, patches.rows(slide, version, status, left)


def apart(slide: CohortSlide, spec: TilingConfig, work: Callable[[], Result], seconds: float | None = None) -> Result:
    """What the work gives in a process of its own; begun again where others killed that.

    Args:
        slide: whose file the work reads.
        spec: its limits, for one piece of work.
        work: picklable, with what it gives and raises.
        seconds: of CPU time, where it may take less.

    Raises:
        SlideError: "too-expensive", it took more than it may; "crash", its process ended.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return child.run(work, child.Limits(seconds or spec.max_seconds, spec.max_slide_gib))
        except (child.LimitError, MemoryError) as error:
            raise SlideError(
                tiler.TOO_EXPENSIVE,
                f"{slide.uri}: reading it was given up: {str(error) or 'memory is short'}. Where the slide is "
                f"sound, raise tiling.max_seconds={spec.max_seconds:g} or "
                f"tiling.max_slide_gib={spec.max_slide_gib:g}; else take it out of the cohort",
            ) from error
        except child.DiedError as error:
            if not error.killed:
                raise SlideError("crash", f"{slide.uri}: {error}; copy the slide again or leave it out") from error
            if attempt == MAX_ATTEMPTS:
                raise SlideError("crash", f"{slide.uri}: {error} {attempt} times; is memory short?") from error
    raise AssertionError("unreachable")
