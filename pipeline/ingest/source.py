"""A slide where it lies: which state its files are in, opened and identified, and whether it still is what it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.slides.folders import main_file
from pipeline.slides.identity import (
    Digest,
    fetch_small,
    is_several,
    reading_source,
    slide_digest,
    slide_files,
    slide_version,
)
from pipeline.slides.open import SlideReader, open_uri
from pipeline.storage import files
from pipeline.storage.files import SourceVersion
from pipeline.storage.listing import Ask
from pipeline.storage.staging import GIB, Fetched, Staging
from pipeline.store.rows import slide_key
from pipeline.tiling.guide import Guide, guided_version, load_network, read_guide
from pipeline.tiling.slide import SlideTiling, effective_mpp, tile_slide

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A slide's files as they were looked at."""

    slide: CohortSlide
    spec: TilingConfig
    version: SourceVersion
    fetched: Fetched | None
    """All bytes of a small file on S3."""

    def check(self) -> None:
        """SlideError "changed" where a file is no longer what it was; bytes that are here are of one state."""
        unchanged(self.slide, self.spec, self.version, _asking(self.slide, self.fetched))()


@dataclass(frozen=True)
class OpenedSlide:
    """A slide that is open, and identified."""

    source: Source
    reader: SlideReader
    place: str
    """Where it is read."""
    digest: Digest
    guide: Guide
    mpp: float | None
    """Microns per level-0 px that it is tiled with."""

    @property
    def key(self) -> str:
        """Of the stored slide."""
        return slide_key(self.digest.sha256, self.mpp, self.guide.digest, self.reader.series)

    def tiling(self) -> SlideTiling:
        """Its patches, planned; errors as `tile_slide` and `load_network`."""
        spec = self.source.spec
        load_network(spec, self.guide)  # no file of the slide: it would be "missing", and never tried again
        with reading_source():
            return tile_slide(self.reader, spec, self.mpp, self.guide)


def look_at(slide: CohortSlide, spec: TilingConfig, size: int) -> Source:
    """Which state the slide is in; of a small one on S3 by reading it.

    Args:
        slide: which one.
        spec: how it is to be tiled.
        size: bytes that its file is known to have.

    Raises:
        SlideError: see `version_of`.
    """
    with reading_source():
        fetched = fetch_small(slide.uri, size)
    return Source(slide, spec, version_of(slide, spec, _asking(slide, fetched)), fetched)


@contextmanager
def identified(source: Source) -> Iterator[OpenedSlide]:
    """The slide, open for the block.

    Raises:
        SlideError: it cannot be read.
    """
    slide, spec = source.slide, source.spec
    if source.version.size == 0:
        raise SlideError("empty-file", f"{slide.uri}: zero bytes; copy the slide again")
    with ExitStack() as stack:
        with reading_source():
            place = stack.enter_context(_at_hand(slide, spec))
            digest, guide = slide_digest(place, source.fetched), read_guide(slide, spec)
        reader = stack.enter_context(_opened(place, slide.series, spec, source.fetched))
        if reader.picked is not None and reader.picked.plane is not None:
            log.info("%s: %s is read", slide.uri, reader.picked.plane)
        yield OpenedSlide(source, reader, place, digest, guide, effective_mpp(reader.mpp, spec, slide.mpp))


def opened(slide: CohortSlide, spec: TilingConfig) -> AbstractContextManager[SlideReader]:
    """The slide, open for the block; SlideError where it cannot be."""
    return _opened(slide.uri, slide.series, spec)


def _opened(
    uri: str, series: int | None, spec: TilingConfig, fetched: Fetched | None = None
) -> AbstractContextManager[SlideReader]:
    return open_uri(uri, partial(slide_files, uri), _staging(spec), fetched, series)


@contextmanager
def _at_hand(slide: CohortSlide, spec: TilingConfig) -> Iterator[str]:
    """Where to identify and open a slide so that its bytes travel once.

    That is its main file; for several files on S3, which only a copy can be opened of, that copy's.
    """
    uri = main_file(slide.uri)
    if files.is_remote(uri) and is_several(uri):
        with _staging(spec).hold(uri, slide_files(uri)) as path:
            yield str(path)
    else:
        yield uri


def _asking(slide: CohortSlide, fetched: Fetched | None) -> Ask:
    """The versions of files; that of bytes that are here is theirs."""
    if fetched is None:
        return files.source_version
    return lambda uri: fetched.version if uri == slide.uri else files.source_version(uri)


def _staging(spec: TilingConfig) -> Staging:
    return Staging(spec.cache, round(spec.cache_gib * GIB))


def unchanged(
    slide: CohortSlide, spec: TilingConfig, version: SourceVersion, ask: Ask = files.source_version
) -> Callable[[], None]:
    """A check that the slide's file is still the one that was looked at first."""

    def check() -> None:
        if version_of(slide, spec, ask) != version:
            raise SlideError("changed", f"{slide.uri}: the file was replaced while it was read; run again")

    return check


def version_of(slide: CohortSlide, spec: TilingConfig, ask: Ask = files.source_version) -> SourceVersion:
    """Which state the slide's files are in, its mask and coordinates included; `ask` gives that of one file.

    Raises:
        SlideError: one of them cannot be reached ("missing", "directory", "source", "coords"), or which are the slide's
            cannot be told ("series").
    """
    with reading_source():
        return guided_version(slide, spec, slide_version(slide.uri, ask), ask)
