"""Which state the files of a whole cohort are in, asked once for all stages of a command."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.cohort.table import CohortSlide
from pipeline.columnar import Columnar
from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.ingest.source import version_of
from pipeline.progress import progress
from pipeline.storage.files import SourceVersion
from pipeline.storage.listing import Ask, ask_all
from pipeline.tiling.guide import may_guide

log = logging.getLogger(__name__)

THREADS = 16  # they wait on the storage
TOGETHER = 512  # slides handed to a thread: handing one over costs as much as looking at it

Looked = SourceVersion | SlideError
"""The state of a slide's files, or why one of them cannot be reached."""


_COLUMNS = pa.schema([("size", pa.int64()), ("etag", pa.string()), ("mtime", pa.float64()), ("error", pa.int32())])


@dataclass
class _Maker:
    """Makes what was found of its columns; errors are few, and kept as they are."""

    errors: list[SlideError] = field(default_factory=list)

    def __call__(self, size: int, etag: str | None, mtime: float | None, error: int | None) -> Looked:
        return SourceVersion(size, etag, mtime) if error is None else self.errors[error]

    def cells(self, looked: Looked) -> Sequence[object]:
        if isinstance(looked, SourceVersion):
            return looked.size, looked.etag, looked.mtime, None
        self.errors.append(looked)
        return None, None, None, len(self.errors) - 1


def look_at(slides: Sequence[CohortSlide], spec: TilingConfig) -> Sequence[Looked]:
    """The versions of all slides, their masks and coordinates included; on S3 a request for a thousand files."""
    uris = (uri for slide in slides for uri in (slide.uri, *may_guide(slide, spec)))
    ask = ask_all(uri for uri in uris if not uri.endswith("/"))  # a folder in a cloud is listed by itself
    size = max(1, min(TOGETHER, -(-len(slides) // THREADS)))  # formats of several files ask for each slide
    make = _Maker()

    def found() -> Iterator[Sequence[object]]:
        window = size * THREADS * 2
        for first in range(0, len(slides), window):  # a pool takes all that it is given at once
            portions = [slides[start : start + size] for start in range(first, min(first + window, len(slides)), size)]
            for part in pool.map(lambda portion: [_look(slide, spec, ask) for slide in portion], portions):
                yield from map(make.cells, part)
                steps.advance(len(part))

    with progress("tile", len(slides), "files looked at") as steps, ThreadPoolExecutor(THREADS) as pool:
        versions = Columnar.of(found(), _COLUMNS, make)
    _warn_unreachable(make.errors, len(slides))
    return versions


def known(versions: Iterable[Looked]) -> Iterator[SourceVersion | None]:
    """Each source's version; None where it cannot be read."""
    return (None if isinstance(version, SlideError) else version for version in versions)


def version_columns(versions: Sequence[Looked]) -> pa.Table:
    """`size`, `etag` and `mtime` of each, null of one that cannot be reached."""
    if not isinstance(versions, Columnar):
        make = _Maker()
        versions = Columnar.of(map(make.cells, versions), _COLUMNS, make)
    return versions.table.drop_columns(["error"])


def _warn_unreachable(found: Sequence[SlideError], slides: int) -> None:
    by_reason: defaultdict[str, list[SlideError]] = defaultdict(list)
    for error in found:
        by_reason[error.reason].append(error)
    for reason, errors in by_reason.items():
        log.warning("%s: %d of %d slides, such as: %s", reason, len(errors), slides, errors[0])


def _look(slide: CohortSlide, spec: TilingConfig, ask: Ask) -> Looked:
    try:
        return version_of(slide, spec, ask)
    except SlideError as error:
        return SlideError(error.reason, str(error))  # without its traceback, of which a million take gigabytes
