"""The cohort: which slides there are, whose they are, their split and their labels.

A CSV or Parquet file at any URI (`rows`). Columns `slide_id` (unique) and `uri`, which `features` (another tool's file)
may stand for; optional `patient_id` (default: the slide is its own patient), `split` (train, val or test), `mpp` (over
the slide's own), `series` (which image of a file that holds several) and the columns of each task's label (`labels`);
all others are kept as text. All that is wrong is reported at once, with row numbers; the header is row 1.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cohort.labels import MISSING, Label, NotAClass, finite, is_missing, other_classes, read_label
from pipeline.cohort.rows import REQUIRED, Rows, parse
from pipeline.columnar import Columnar, texts
from pipeline.config.data import TaskConfig
from pipeline.credentials import refusal
from pipeline.errors import CohortError, StorageError
from pipeline.slides.folders import place_of
from pipeline.storage import files

SPLITS = ("train", "val", "test")
_RESERVED = ("slide_id", "uri", "patient_id", "split", "mpp", "mask", "coords", "series", "features")
_SHOWN_ROWS = 20  # of each problem; the rest are counted


@dataclass(frozen=True, slots=True)
class CohortSlide:
    """One row."""

    slide_id: str
    uri: str
    """Absolute path or s3:// URI; that of a folder in a cloud ends with `/`."""
    patient_id: str
    split: str | None
    """train, val, test, or None when the cohort has no splits yet."""
    mpp: float | None
    """Microns per level-0 px, in place of what the slide says."""
    labels: Mapping[str, Label | None]
    """Task name -> its label (`labels`), with classes spelled as the task spells them; None: not known."""
    extra: Mapping[str, str]
    """All other columns, as text."""
    mask: str | None = None
    """URI of a tissue mask: PNG, TIFF, or GeoJSON in QuPath's coordinates."""
    coords: str | None = None
    """URI of an HDF5 file of TRIDENT or CLAM with the patches to cut."""
    series: int | None = None
    """Number of the file's image to take; None: the one that is the slide."""
    features: str | None = None
    """URI of a file of TRIDENT's, CLAM's or STAMP's features of the slide, which only some recipes take."""


_COLUMNS = pa.schema(
    [
        ("slide_id", pa.string()),
        ("uri", pa.string()),
        ("patient_id", pa.string()),
        ("split", pa.string()),
        ("mpp", pa.float64()),
        ("mask", pa.string()),
        ("coords", pa.string()),
        ("features", pa.string()),
        ("series", pa.int64()),
        ("labels", pa.int32()),  # their number among the different ones
    ]
)
"""Of the rows of a file; then all other columns, as text."""


@dataclass(frozen=True)
class _Maker:
    """Makes a row of its columns."""

    labels: list[Mapping[str, Label | None]]
    extra: tuple[str, ...]

    def __call__(self, *values: Any) -> CohortSlide:
        slide_id, uri, patient_id, split, mpp, mask, coords, features, series, labels, *extra = values
        others = dict(zip(self.extra, extra, strict=True))
        given = slide_id, uri, patient_id, split, mpp, self.labels[labels], others, mask, coords, series, features
        return CohortSlide(*given)


@dataclass(frozen=True)
class Cohort:
    """All rows, in the order of the file."""

    uri: str
    slides: Sequence[CohortSlide]
    """Those of a file are made when they are asked for."""

    @property
    def digest(self) -> str:
        """sha256 (hex) over what decides a result: ids, URIs, patients, splits, mpp, labels, what is given beside."""
        hasher = hashlib.sha256()
        for slide in self.slides:
            row = [slide.slide_id, slide.uri, slide.patient_id, slide.split, slide.mpp, dict(slide.labels)]
            row += [slide.mask, slide.coords, slide.series]
            hasher.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return hasher.hexdigest()

    @property
    def has_splits(self) -> bool:
        """Whether every slide stands in a split."""
        return all(slide.split is not None for slide in self.slides)

    def subset(self, split: str) -> tuple[CohortSlide, ...]:
        """The slides of one split."""
        return tuple(slide for slide in self.slides if slide.split == split)

    def with_splits(self, split_of: Callable[[CohortSlide], str | None]) -> Cohort:
        """The same slides in these splits."""
        if isinstance(self.slides, Columnar):
            return replace(self, slides=self.slides.with_column("split", [split_of(slide) for slide in self.slides]))
        return replace(self, slides=tuple(replace(slide, split=split_of(slide)) for slide in self.slides))


def read_cohort(uri: str, tasks: Sequence[TaskConfig] = ()) -> Cohort:
    """Read and check a cohort; labels are read for `tasks` only.

    Relative slide URIs are taken from the cohort's folder. A label may be missing where another task has one.

    Raises:
        CohortError: the file or its rows are wrong.
        StorageError: the file cannot be read.
    """
    uri = files.absolute(uri)
    data = files.read_bytes(uri)
    columns, rows, problems = parse(uri, data)
    required = [column for column in REQUIRED if column != "uri" or "features" not in columns]
    needed = dict.fromkeys([*required, *(column for task in tasks for column in task.columns)])
    missing = [column for column in needed if column not in columns]
    absent = [_missing(missing, columns, tasks)] if missing else []
    if set(required) & set(missing):
        deque(rows, maxlen=0)  # which tells what is wrong with them
        raise CohortError(uri, [*problems, *absent])
    places = {task.name: f"tasks.{place}" for place, task in enumerate(tasks)}
    tasks = [task for task in tasks if not set(task.columns) & set(missing)]
    found = _Problems()
    folder, numbers, used = files.parent(uri), array("q"), _used(tasks)
    extra = [column for column in dict.fromkeys(columns) if column not in used]
    checked = (_slide(number, row, folder, tasks, extra, found) for number, row in _counted(rows, numbers))
    slides = _as_columns(checked, tuple(extra))
    _check_rows(numbers, slides, found)
    for task in tasks:
        found.add_other_classes(task, places[task.name], (slide.labels[task.name] for slide in slides))
    problems += [*absent, *found.lines()]
    if not slides and not problems:
        problems.append("no rows below the header; list at least one slide")
    if problems:
        raise CohortError(uri, problems)
    return Cohort(uri, slides)


def _as_columns(slides: Iterable[CohortSlide], extra: tuple[str, ...]) -> Columnar[CohortSlide]:
    make = _Maker([], extra)
    known: dict[tuple[Label | None, ...], int] = {}

    def cells() -> Iterator[Sequence[object]]:
        for slide in slides:
            labels = known.setdefault(tuple(slide.labels.values()), len(known))
            if labels == len(make.labels):
                make.labels.append(slide.labels)
            given = [slide.slide_id, slide.uri, slide.patient_id, slide.split, slide.mpp]
            given += [slide.mask, slide.coords, slide.features, slide.series, labels]
            yield [*given, *slide.extra.values()]

    return Columnar.of(cells(), pa.schema([*_COLUMNS, *((f"extra.{name}", pa.string()) for name in extra)]), make)


def _used(tasks: Sequence[TaskConfig]) -> set[str]:
    """Columns that are more than text."""
    return {*_RESERVED, *(column for task in tasks for column in task.columns)}


def _counted(rows: Rows, numbers: array[int]) -> Rows:
    """The same, with the numbers of those that were taken."""
    for number, row in rows:
        numbers.append(number)
        yield number, row


class _Problems:
    """What is wrong, each with the rows it is wrong in."""

    def __init__(self) -> None:
        self._rows: defaultdict[str, list[int]] = defaultdict(list)
        self._others: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))

    def add(self, row: int, text: str) -> None:
        self._rows[text].append(row)

    def add_not_classes(self, row: int, task: TaskConfig, texts: Sequence[str]) -> None:
        """Keep them until all of the column is known: the remedy names every value."""
        for text in texts:
            self._others[task.name][text].append(row)

    def add_other_classes(self, task: TaskConfig, field: str, labels: Iterable[Label | None]) -> None:
        """One problem of all values of a column that are no classes."""
        others = self._others[task.name]
        if others:
            text = other_classes(task, field, {value: len(rows) for value, rows in others.items()}, labels)
            self._rows[text] = sorted({row for rows in others.values() for row in rows})

    def lines(self) -> list[str]:
        return [f"{_rows(rows)}: {text}" for text, rows in sorted(self._rows.items(), key=lambda item: item[1])]


def _rows(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN_ROWS]))
    more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
    return f"row{'s' * (len(rows) > 1)} {shown}{more}"


def _missing(missing: Sequence[str], columns: Sequence[str], tasks: Sequence[TaskConfig]) -> str:
    """That columns are missing, and whether they are there in another way."""
    text = f"missing column{'s' * (len(missing) > 1)} {_names(missing)}; found {_names(columns)}"
    alike = {_plain(column): column for column in columns if column not in missing}
    renamed = [f"{alike[_plain(name)]!r} to {name!r}" for name in missing if _plain(name) in alike]
    if renamed:
        return f"{text}; rename {', '.join(renamed)}"
    fields = [f"tasks.{place}.column" for place, task in enumerate(tasks) if task.column in missing]
    fields += [f"tasks.{place}.event_column" for place, task in enumerate(tasks) if task.event_column in missing]
    return f"{text}; name the right one{'s' * (len(fields) > 1)} in {', '.join(fields)}" if fields else text


def _plain(name: str) -> str:
    """A column's name as people vary it: case, and what stands between its words."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _slide(
    number: int, row: Mapping[str, str], folder: str, tasks: Sequence[TaskConfig], extra: list[str], problems: _Problems
) -> CohortSlide:
    features = _beside("features", row, folder, number, problems)
    for column, text in (("slide_id", row["slide_id"]), ("uri", row.get("uri", "") or features)):
        if not text:
            problems.add(number, f"{column} is empty")
    if leaks := {column: problem for column, value in row.items() if (problem := refusal(value)) is not None}:
        for column, problem in leaks.items():
            problems.add(number, f"column {column!r}: {problem}")
        row = {**row, **dict.fromkeys(leaks, ""), "slide_id": f"row {number}"}  # nothing else may repeat it
    split = row.get("split", "")
    if split and split not in SPLITS:
        problems.add(number, f"split {split!r} is not one of {_names(SPLITS)}")
    labels = {task.name: _label(number, row, task, problems) for task in tasks}
    if tasks and all(is_missing(task, row) for task in tasks):
        problems.add(number, f"no label in column {_names(dict.fromkeys(task.column for task in tasks))}")
    patient = row.get("patient_id", "")
    return CohortSlide(
        slide_id=row["slide_id"],
        uri=_resolve(row["uri"], folder, number, problems) if row.get("uri") else features or "",
        patient_id=row["slide_id"] if patient.casefold() in MISSING else patient,
        split=split or None,
        mpp=_mpp(number, row.get("mpp", ""), problems),
        labels=labels,
        extra={name: row[name] for name in extra},
        mask=_beside("mask", row, folder, number, problems),
        coords=_beside("coords", row, folder, number, problems),
        series=_series(number, row.get("series", ""), problems),
        features=features,
    )


def _beside(column: str, row: Mapping[str, str], folder: str, number: int, problems: _Problems) -> str | None:
    """The URI of a file that belongs to the slide; None where the column is absent or empty."""
    text = row.get(column, "")
    return None if text.casefold() in MISSING else _resolve(text, folder, number, problems, column)


def _resolve(uri: str, folder: str, row: int, problems: _Problems, column: str = "uri") -> str:
    """The absolute URI; what is relative starts in the cohort's folder."""
    try:
        relative = not files.is_remote(uri) and not uri.startswith(("/", "~", "file://"))
        return place_of(f"{folder.rstrip('/')}/{uri}" if relative else uri)
    except StorageError as error:
        problems.add(row, f"column {column!r}: {error}")
        return uri


def _mpp(row: int, text: str, problems: _Problems) -> float | None:
    if text.casefold() in MISSING:
        return None
    value = finite(text)
    if value is None or value <= 0:
        problems.add(row, f"mpp {text!r} is not a positive number; write microns per level-0 px, as in 0.25")
        return None
    return value


def _series(row: int, text: str, problems: _Problems) -> int | None:
    if text.casefold() in MISSING:
        return None
    value = finite(text)
    if value is None or not 0 <= value < 2**31 or value != int(value):
        problems.add(row, f"series {text!r} is no whole number from 0; write the number of the file's image, as in 1")
        return None
    return int(value)


def _label(number: int, row: Mapping[str, str], task: TaskConfig, problems: _Problems) -> Label | None:
    try:
        return read_label(task, row)
    except NotAClass as error:
        problems.add_not_classes(number, task, error.texts)
        return None
    except ValueError as error:
        problems.add(number, str(error))
        return None


def _check_rows(numbers: Sequence[int], slides: Columnar[CohortSlide], problems: _Problems) -> None:
    """What only shows across rows: double ids, patients in two splits, splits that are given in part."""
    table = slides.table
    if repeated := _repeated(table["slide_id"]):
        for number, slide in zip(numbers, slides, strict=True):
            if slide.slide_id in repeated:
                problems.add(number, f"slide_id {slide.slide_id!r} is not unique")
    given = table.filter(pc.is_in(table["split"], value_set=texts(SPLITS))).select(["patient_id", "split"])
    pairs = set(zip(given["patient_id"].to_pylist(), given["split"].to_pylist(), strict=True))
    if torn := {patient for patient, count in Counter(one for one, _ in pairs).items() if patient and count > 1}:
        splits: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for number, slide in zip(numbers, slides, strict=True):
            if slide.patient_id in torn and slide.split in SPLITS:
                splits[slide.patient_id].setdefault(slide.split, number)
        for patient, first in splits.items():
            for row in first.values():
                problems.add(row, f"patient {patient!r} stands in {len(first)} splits ({', '.join(first)}); keep one")
    if len(given):
        for row in pc.indices_nonzero(pc.is_null(table["split"])).to_pylist():
            problems.add(numbers[row], "split is empty; give every slide a split, or none of them")


def _repeated(column: pa.ChunkedArray) -> set[str]:
    """What stands in more than one row, but for empty text, which is told of by itself."""
    distinct = pc.count_distinct(column).as_py() == len(column)
    return set() if distinct else {text for text, rows in Counter(column.to_pylist()).items() if rows > 1 and text}
