"""What a tile worker does: one slide into the store, whole or a share of it, and the status it ends with."""

from __future__ import annotations

import base64
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import ConfigError, SlideError, StorageError
from pipeline.ingest.balance import share_count
from pipeline.slides.identity import fetch_small, is_several, reading_source, slide_digest, slide_files, slide_version
from pipeline.slides.open import SlideReader, open_uri
from pipeline.storage import files
from pipeline.storage.files import SourceVersion
from pipeline.storage.listing import Ask
from pipeline.storage.staging import GIB, Fetched, Staging
from pipeline.store.commit import (
    PlannedSlide,
    commit_shares,
    plan_slide,
    write_pictures,
    write_plan,
    write_share,
    write_slide,
)
from pipeline.store.parts import part_count
from pipeline.store.patches import PatchStore, SlideStatus, StoredSlide, slide_key, stored_slide
from pipeline.tiling.evidence import THUMBNAIL
from pipeline.tiling.guide import guided_version, read_guide
from pipeline.tiling.slide import effective_mpp, tile_slide

log = logging.getLogger(__name__)

TRANSIENT = frozenset({"missing", "directory", "source", "changed", "cache", "codec", "crash"})
"""Reasons that say nothing about the slide's content: they are not recorded, and tried again by the next run."""

TOO_EXPENSIVE = "too-expensive"
"""Reason of a slide that took more than `spec` allows; recorded, and tried again where it allows more."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class LargeSlide:
    """A planned slide of more patches than one task should read. Picklable."""

    slide: CohortSlide
    version: SourceVersion
    planned: PlannedSlide

    def share(self, parts: range) -> LargeSlide:
        """What goes to the task that writes these parts."""
        return replace(self, planned=self.planned.share(parts))


def store_slide(slide: CohortSlide, spec: TilingConfig, store: str) -> SlideStatus:
    """Tile one slide into the store, here and now; whatever is wrong with it becomes its status.

    Raises:
        StorageError: the store itself cannot be read or written.
    """
    status = begin_slide(slide, spec, store, whole=True)
    assert isinstance(status, SlideStatus)
    return status


def begin_slide(
    slide: CohortSlide, spec: TilingConfig, store: str, *, whole: bool, pixels: bool = True
) -> SlideStatus | LargeSlide:
    """As `store_slide`; unless `whole`, a slide for more than one task is only planned.

    Without `pixels` the plan is committed instead of the patches, to a store of plans.
    """
    patches = PatchStore(store, spec.fingerprint())
    try:
        version = version_of(slide, spec)
    except SlideError as error:
        return quarantined(slide, error.reason, error)
    return _outcome(slide, version, patches, lambda: _begin(slide, version, spec, patches, whole=whole, pixels=pixels))


def store_share(large: LargeSlide, parts: range, spec: TilingConfig, store: str) -> SlideStatus | None:
    """Write some parts of a large slide; None when all is well, else the status that the slide ends with.

    Raises:
        StorageError: the store itself cannot be read or written.
    """
    slide, patches = large.slide, PatchStore(store, spec.fingerprint())
    known = known_status(patches, slide, large.version, spec)  # given up by another share, committed by another job
    if known is not None:
        return known

    def work() -> None:
        check = _unchanged(slide, spec, large.version)
        check()
        if large.planned.is_done(patches):  # from another file with the same content
            return
        with opened(slide, spec) as reader, _leaving(patches, large.planned):
            write_share(patches, large.planned.attached(reader), parts, check)

    return _outcome(slide, large.version, patches, work)


def finish_slide(large: LargeSlide, spec: TilingConfig, store: str) -> SlideStatus:
    """Commit a large slide whose shares are all written.

    Raises:
        StorageError: the store itself cannot be read or written.
    """
    patches = PatchStore(store, spec.fingerprint())

    def work() -> SlideStatus:
        _unchanged(large.slide, spec, large.version)()
        with _leaving(patches, large.planned):
            return _committed(large.slide, commit_shares(patches, large.planned))

    return _outcome(large.slide, large.version, patches, work)


def known_status(
    patches: PatchStore, slide: CohortSlide, version: SourceVersion, spec: TilingConfig
) -> SlideStatus | None:
    """What the store knows of the slide; None also where it was too expensive for less than it may take now."""
    status = patches.status(slide, version)
    return None if status is None or may_go_further(status, spec) else status


def may_go_further(status: SlideStatus, spec: TilingConfig) -> bool:
    """Whether the slide was given up as too expensive, and may take more now."""
    return status.limits is not None and allows_more(spec, status.limits)


def allows_more(spec: TilingConfig, limits: Sequence[float]) -> bool:
    """Whether a slide may take more now than the seconds and GiB that were not enough."""
    seconds, gib = limits
    return spec.max_seconds > seconds or spec.max_slide_gib > gib


def quarantined(slide: CohortSlide, reason: str, error: Exception) -> SlideStatus:
    """The status of a slide that cannot be used."""
    message = f"{reason}: {error}" if str(error) else f"{reason}: {type(error).__name__}"
    trace = "".join(traceback.format_exception(error))
    picture = error.picture if isinstance(error, SlideError) else None
    small = None if picture is None else base64.b64encode(picture).decode()
    return SlideStatus(slide.slide_id, slide.uri, None, "quarantined", message, error=trace, picture=small)


def _begin(
    slide: CohortSlide, version: SourceVersion, spec: TilingConfig, patches: PatchStore, *, whole: bool, pixels: bool
) -> SlideStatus | LargeSlide:
    if version.size == 0:
        raise SlideError("empty-file", f"{slide.uri}: zero bytes; copy the slide again")
    with ExitStack() as stack:
        with reading_source():
            place, fetched = stack.enter_context(_at_hand(slide, spec))
            digest, guide = slide_digest(place, fetched), read_guide(slide, spec)
        reader = stack.enter_context(_opened(place, slide.series, spec, fetched))
        if reader.picked is not None and reader.picked.plane is not None:
            log.info("%s: %s is read", slide.uri, reader.picked.plane)
        mpp = effective_mpp(reader.mpp, spec, slide.mpp)
        key = slide_key(digest.sha256, mpp, guide.digest, reader.series)
        known = patches.written(key)
        if known is not None and (digest.whole or known["n_bad_tiles"] == 0):
            return _committed(slide, stored_slide(patches.uri, known))
        with reading_source():
            tiling = tile_slide(reader, spec, mpp, guide)
        if known is not None:
            lost = {(x, y) for x, y in known["bad_tiles"]}
            with reading_source():
                if tiling.reads_any(lost):  # a mended copy: the samples do not tell it
                    digest = slide_digest(place, whole=True)
            key = slide_key(digest.sha256, mpp, guide.digest, reader.series)
            known = patches.written(key)
            if known is not None:
                return _committed(slide, stored_slide(patches.uri, known))
        sampled = None if digest.whole else version
        planned = plan_slide(digest.sha256, mpp, reader, tiling, guide.digest, sampled)
        check = _unchanged(slide, spec, version)
        if not pixels:
            return _committed(slide, write_plan(patches, planned, check))
        if not whole and share_count(part_count(planned.tiling), planned.tiling.grid.patch_px) > 1:
            check()  # the plan is of this version
            return LargeSlide(slide, version, write_pictures(patches, planned))
        with _leaving(patches, planned):
            return _committed(slide, write_slide(patches, planned, check))


@contextmanager
def _leaving(patches: PatchStore, planned: PlannedSlide) -> Iterator[None]:
    """A slide that is given up in the block leaves files under its key; a share has its picture there."""
    try:
        yield
    except SlideError as error:
        error.left, seen = planned.key, planned.pictures.get(THUMBNAIL)
        error.picture = seen or files.read_if_there(files.join(patches.uri, planned.key, THUMBNAIL))
        raise


def _outcome(
    slide: CohortSlide, version: SourceVersion, patches: PatchStore, work: Callable[[], Result]
) -> Result | SlideStatus:
    """What the work gives; whatever is wrong with the slide as its status. A final status is recorded."""
    left = None
    try:
        found = work()
    except SlideError as error:
        status, left = quarantined(slide, error.reason, error), error.left
        if error.reason in TRANSIENT:
            return status
    except (StorageError, ConfigError, MemoryError):
        raise  # the store's, or this node's: what concerns the slide is a SlideError by now
    except Exception as error:  # one slide's unforeseen failure must not end the others' run
        return quarantined(slide, "crash", error)
    else:
        if not isinstance(found, SlideStatus):
            return found
        status = found
    patches.record(slide, version, status, left)
    return status


def opened(slide: CohortSlide, spec: TilingConfig) -> AbstractContextManager[SlideReader]:
    """The slide, open for the block; SlideError where it cannot be."""
    return _opened(slide.uri, slide.series, spec)


def _opened(
    uri: str, series: int | None, spec: TilingConfig, fetched: Fetched | None = None
) -> AbstractContextManager[SlideReader]:
    return open_uri(uri, partial(slide_files, uri), _staging(spec), fetched, series)


@contextmanager
def _at_hand(slide: CohortSlide, spec: TilingConfig) -> Iterator[tuple[str, Fetched | None]]:
    """Where to identify and open a slide so that its bytes travel once, and all of them where they are few.

    That is the slide's place; for several files on S3, which only a copy can be opened of, that copy.
    """
    if files.is_remote(slide.uri) and is_several(slide.uri):
        with _staging(spec).hold(slide.uri, slide_files(slide.uri)) as path:
            yield str(path), None
    else:
        yield slide.uri, fetch_small(slide.uri)


def _staging(spec: TilingConfig) -> Staging:
    return Staging(spec.cache, round(spec.cache_gib * GIB))


def _unchanged(slide: CohortSlide, spec: TilingConfig, version: SourceVersion) -> Callable[[], None]:
    """A check that the slide's file is still the one that was looked at first."""

    def check() -> None:
        if version_of(slide, spec) != version:
            raise SlideError("changed", f"{slide.uri}: the file was replaced while it was read; run again")

    return check


def version_of(slide: CohortSlide, spec: TilingConfig, ask: Ask = files.source_version) -> SourceVersion:
    """Which state the slide's files are in, its mask and coordinates included; `ask` gives that of one file.

    Raises:
        SlideError: one of them cannot be reached ("missing", "directory", "source", "coords").
    """
    with reading_source():
        return guided_version(slide, spec, slide_version(slide.uri, ask), ask)


def _committed(slide: CohortSlide, stored: StoredSlide) -> SlideStatus:
    counts = stored.n_patches, stored.n_bad_tiles
    return SlideStatus(slide.slide_id, slide.uri, stored.key, "committed", None, *counts)
