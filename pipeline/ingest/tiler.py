"""What a tile worker does: one slide into the store, whole or a share of it, and the status it ends with."""

from __future__ import annotations

import base64
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from pipeline.cohort.table import CohortSlide
from pipeline.config.base import fingerprint
from pipeline.config.data import TilingConfig
from pipeline.errors import ConfigError, SlideError, StorageError
from pipeline.ingest.balance import share_count
from pipeline.ingest.source import OpenedSlide, identified, look_at, opened, unchanged, version_of
from pipeline.slides.identity import reading_source, slide_digest
from pipeline.storage import files
from pipeline.storage.files import SourceVersion
from pipeline.store.catalogue import Row
from pipeline.store.commit import (
    PlannedSlide,
    commit_shares,
    drop_records,
    plan_slide,
    write_pictures,
    write_plan,
    write_share,
    write_slide,
)
from pipeline.store.packs import SmallSlide
from pipeline.store.parts import part_count
from pipeline.store.patches import UNFINISHED, PatchStore, SlideStatus, StoredSlide, stored_slide
from pipeline.store.rows import asked_digest, slide_key
from pipeline.store.small import is_small, plan_small, read_small
from pipeline.tiling.evidence import THUMBNAIL
from pipeline.tiling.slide import SlideTiling

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


@dataclass(frozen=True)
class ReadSlide:
    """A small slide whose patches wait for others, to be committed in one pack with them. Picklable."""

    slide: CohortSlide
    version: SourceVersion
    small: SmallSlide

    @property
    def status(self) -> SlideStatus:
        """What it ends with once its pack is committed."""
        facts = self.small.facts
        counts = facts["n_patches"], facts["n_bad_tiles"]
        named = self.slide.slide_id, self.slide.uri, self.small.key
        return SlideStatus(*named, "committed", None, *counts, version=self.version)


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

    def work(version: SourceVersion, _patches: PatchStore) -> tuple[SlideStatus | LargeSlide, list[Row]]:
        return _begun(slide, version.size, spec, store, partial(_stored, whole=whole, pixels=pixels))

    return by_itself(slide, spec, store, work)


def by_itself(
    slide: CohortSlide,
    spec: TilingConfig,
    store: str,
    work: Callable[[SourceVersion, PatchStore], tuple[Result | SlideStatus, list[Row]]],
) -> Result | SlideStatus:
    """What the store knows of a slide, or what the work gives, whose rows are committed at once."""
    patches = PatchStore(store, spec.fingerprint())
    try:
        version = version_of(slide, spec)
    except SlideError as error:
        return quarantined(slide, error.reason, error)
    known = known_status(patches, slide, version, spec)
    if known is not None:
        return known
    found, rows = work(version, patches)
    patches.append(rows)
    return found


def read_slide(
    slide: CohortSlide, size: int, spec: TilingConfig, store: str, *, pixels: bool = True
) -> tuple[SlideStatus | LargeSlide | ReadSlide, list[Row]]:
    """As `begin_slide`, of a slide that is committed with others: what it came to, and rows for the catalogue.

    Args:
        slide: which one.
        size: bytes that its file is known to have.
        spec: how to tile.
        store: where to.
        pixels: see `begin_slide`.
    """
    return _begun(slide, size, spec, store, partial(_read_or_stored, pixels=pixels))


def store_share(large: LargeSlide, parts: range, spec: TilingConfig, store: str) -> SlideStatus | None:
    """Write some parts of a large slide; None when all is well, else the status that the slide ends with.

    Raises:
        StorageError: the store itself cannot be read or written.
    """
    slide, patches = large.slide, PatchStore(store, spec.fingerprint())
    if files.exists(_given_up(large, spec, patches)):  # by another share; the catalogue would be hundreds of files
        return known_status(patches, slide, large.version, spec)

    def work() -> None:
        check = unchanged(slide, spec, large.version)
        check()
        if large.planned.is_done(patches):  # by another job, or from another file with the same content
            return
        with opened(slide, spec) as reader, _leaving(patches, large.planned):
            write_share(patches, large.planned.attached(reader), parts, check)

    status, rows = outcome_of(slide, large.version, patches, work)
    give_up(large, spec, patches, rows)
    return status


def give_up(large: LargeSlide, spec: TilingConfig, patches: PatchStore, rows: list[Row]) -> None:
    """Record a share's final status, if `rows` hold one, and leave a mark by which the slide's other shares know it."""
    patches.append(rows)
    if rows:
        files.write_bytes(_given_up(large, spec, patches), b"a share of this slide was given up\n")


def _given_up(large: LargeSlide, spec: TilingConfig, patches: PatchStore) -> str:
    """The mark of this version of the file, as long as it may take no more."""
    limits = [spec.max_seconds, spec.max_slide_gib]
    name = fingerprint({"asked": asked_digest(large.slide, large.version), "limits": limits})
    return files.join(patches.uri, UNFINISHED, large.planned.key, f"given-up-{name}")


def finish_slide(large: LargeSlide, spec: TilingConfig, store: str) -> SlideStatus:
    """Commit a large slide whose shares are all written.

    Raises:
        StorageError: the store itself cannot be read or written.
    """
    status, rows = finished(large, spec, store)
    PatchStore(store, spec.fingerprint()).append(rows)
    return status


def finished(large: LargeSlide, spec: TilingConfig, store: str) -> tuple[SlideStatus, list[Row]]:
    """As `finish_slide`, of a slide that is committed with others, by these rows."""
    patches = PatchStore(store, spec.fingerprint())

    def work() -> SlideStatus:
        unchanged(large.slide, spec, large.version)()
        with _leaving(patches, large.planned):
            return _committed(large.slide, commit_shares(patches, large.planned))

    return outcome_of(large.slide, large.version, patches, work)


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


def _begun(
    slide: CohortSlide, size: int, spec: TilingConfig, store: str, work: Callable[[OpenedSlide, PatchStore], Result]
) -> tuple[Result | SlideStatus, list[Row]]:
    """What the work gives of the slide, opened and identified, or what is wrong with it."""
    patches = PatchStore(store, spec.fingerprint())
    try:
        source = look_at(slide, spec, size)
    except SlideError as error:
        return quarantined(slide, error.reason, error), []

    def opened_first() -> Result:
        with identified(source) as found:
            return work(found, patches)

    return outcome_of(slide, source.version, patches, opened_first)


def _read_or_stored(found: OpenedSlide, patches: PatchStore, *, pixels: bool) -> SlideStatus | LargeSlide | ReadSlide:
    """A small slide read for a pack; another one stored."""
    if not found.digest.whole:  # what is small has every byte in its digest, so copies that share it are the same
        return _stored(found, patches, whole=False, pixels=pixels)
    tiling = found.tiling()
    if not is_small(found.reader, tiling):
        return _stored(found, patches, tiling, whole=False, pixels=pixels)
    slide, source = (found.digest.sha256, found.mpp, found.reader, tiling, found.guide.digest), found.source
    try:
        if pixels:
            small = read_small(*slide)
        else:
            small = plan_small(*slide, source.version.size, distrusted=patches.is_distrusted(found.key))
    except SlideError as error:
        error.picture = tiling.thumbnail.jpeg
        raise
    source.check()
    return ReadSlide(source.slide, source.version, small)


def _stored(
    found: OpenedSlide, patches: PatchStore, tiling: SlideTiling | None = None, *, whole: bool, pixels: bool
) -> SlideStatus | LargeSlide:
    """The slide in a folder of its own, or planned for that."""
    source, slide, reader, digest = found.source, found.source.slide, found.reader, found.digest
    known = patches.written(found.key)
    if known is not None and (digest.whole or known["n_bad_tiles"] == 0):
        drop_records(patches, found.key)
        return _committed(slide, stored_slide(patches.uri, known))
    tiling = found.tiling() if tiling is None else tiling
    if known is not None:
        lost = {(x, y) for x, y in known["bad_tiles"]}
        with reading_source():
            if tiling.reads_any(lost):  # a mended copy: the samples do not tell it
                digest = slide_digest(found.place, whole=True)
        key = slide_key(digest.sha256, found.mpp, found.guide.digest, reader.series)
        known = patches.written(key)
        if known is not None:
            return _committed(slide, stored_slide(patches.uri, known))
    sampled = None if digest.whole else source.version
    planned = plan_slide(digest.sha256, found.mpp, reader, tiling, found.guide.digest, sampled)
    if not pixels:
        return _committed(slide, write_plan(patches, planned, source.check))
    if not whole and share_count(part_count(planned.tiling), planned.tiling.grid.patch_px) > 1:
        source.check()  # the plan is of this version
        return LargeSlide(slide, source.version, write_pictures(patches, planned))
    with _leaving(patches, planned):
        return _committed(slide, write_slide(patches, planned, source.check))


@contextmanager
def _leaving(patches: PatchStore, planned: PlannedSlide) -> Iterator[None]:
    """A slide that is given up in the block leaves files under its key; a share has its picture there."""
    try:
        yield
    except SlideError as error:
        error.left, seen = planned.key, planned.pictures.get(THUMBNAIL)
        error.picture = seen or files.read_if_there(files.join(patches.uri, planned.key, THUMBNAIL))
        raise


def outcome_of(
    slide: CohortSlide, version: SourceVersion, patches: PatchStore, work: Callable[[], Result]
) -> tuple[Result | SlideStatus, list[Row]]:
    """What the work gives; whatever is wrong with the slide as its status. With the rows of a final status."""
    left = None
    try:
        found = work()
    except SlideError as error:
        status, left = quarantined(slide, error.reason, error), error.left
        if error.reason in TRANSIENT:
            return status, []
    except (StorageError, ConfigError, MemoryError):
        raise  # the store's, or this node's: what concerns the slide is a SlideError by now
    except Exception as error:  # one slide's unforeseen failure must not end the others' run
        return quarantined(slide, "crash", error), []
    else:
        if not isinstance(found, SlideStatus):
            return found, []
        status = found
    return replace(status, version=version), patches.rows(slide, version, status, left)


def _committed(slide: CohortSlide, stored: StoredSlide) -> SlideStatus:
    counts = stored.n_patches, stored.n_bad_tiles
    return SlideStatus(slide.slide_id, slide.uri, stored.key, "committed", None, *counts)
