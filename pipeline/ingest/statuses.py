"""What became of a cohort's slides, as columns: of those that the store knows, and of others as they are done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cohort.table import CohortSlide
from pipeline.columnar import Columnar, joined, texts
from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.ingest.tiler import may_go_further, quarantined
from pipeline.ingest.versions import Looked, known, version_columns
from pipeline.storage.files import SourceVersion
from pipeline.store.patches import PatchStore, SlideStatus

_COLUMNS = pa.schema(
    [
        ("number", pa.int64()),
        ("slide_id", pa.string()),
        ("uri", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("n_patches", pa.int64()),
        ("n_bad_tiles", pa.int64()),
        ("error", pa.string()),
        ("picture", pa.string()),
        ("max_seconds", pa.float64()),
        ("max_gib", pa.float64()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("mtime", pa.float64()),
    ]
)


def look_up(
    slides: Sequence[CohortSlide],
    versions: Sequence[Looked],
    spec: TilingConfig,
    patches: PatchStore,
    fresh: MutableSequence[int],
) -> Iterator[tuple[int, SlideStatus]]:
    """Numbers and statuses of the slides that need no work, done before or out of reach; of the others into `fresh`."""
    found = patches.statuses(slides, known(versions))
    for number, (slide, version, status) in enumerate(zip(slides, versions, found, strict=True)):
        if isinstance(version, SlideError):
            yield number, quarantined(slide, version.reason, version)
        elif status is None or may_go_further(status, spec):
            fresh.append(number)
        else:
            yield number, status


def numbered(statuses: Iterable[tuple[int, SlideStatus]]) -> Columnar[SlideStatus]:
    """Statuses with their slides' numbers in the cohort, as they come."""
    return Columnar.of((_cells(number, status) for number, status in statuses), _COLUMNS, _status)


def _cells(number: int, s: SlideStatus) -> Sequence[object]:
    version = (None, None, None) if s.version is None else (s.version.size, s.version.etag, s.version.mtime)
    given = [number, s.slide_id, s.uri, s.key, s.status, s.reason, s.n_patches, s.n_bad_tiles, s.error, s.picture]
    return [*given, *(s.limits or (None, None)), *version]


def in_order(*parts: Columnar[SlideStatus]) -> Columnar[SlideStatus]:
    """Those of all parts, which `numbered` made, by their numbers."""
    table = joined([part.table for part in parts])
    return Columnar(table.sort_by("number") if len(parts) > 1 else table, _status)


def as_columns(statuses: Iterable[SlideStatus]) -> Columnar[SlideStatus]:
    """The same in columns, which have the names of the fields but for `limits`."""
    return statuses if isinstance(statuses, Columnar) else numbered(enumerate(statuses))


def outcomes(slides: Sequence[CohortSlide], statuses: Iterable[SlideStatus], versions: Sequence[Looked]) -> pa.Table:
    """What the ledgers are of: a row a slide, its status in columns named as the fields, and its `patient_id`.

    `size`, `etag` and `mtime` are of its files as they were read, else as they were in `versions`; null where they
    could not be reached.
    """
    held, looked = as_columns(statuses).table.drop_columns(["picture"]), version_columns(versions)
    read = pc.is_valid(held["size"])
    for place, name in enumerate(held.column_names):
        if name in looked.column_names:
            held = held.set_column(place, name, pc.if_else(read, held[name], looked[name]))
    if isinstance(slides, Columnar):
        return held.append_column("patient_id", slides.table["patient_id"])
    return held.append_column("patient_id", texts([slide.patient_id for slide in slides]))


def _status(*values: Any) -> SlideStatus:
    _, *given, seconds, gib, size, etag, mtime = values
    limits = None if seconds is None else (seconds, gib)
    version = None if size is None else SourceVersion(size, etag, mtime)
    return SlideStatus(*(*given, limits, version))
