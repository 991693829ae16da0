"""The cohort: which slides there are, whose they are, their split and their labels.

A CSV (UTF-8) or Parquet file at any URI. Columns `slide_id` (unique) and `uri`; optional `patient_id` (default:
the slide is its own patient), `split` (train, val or test), `mpp` (microns per level-0 px, overrides the
slide's own) and the columns of each task's label (`labels`); all others are kept as text. Everything wrong with
the file is reported at once, with row numbers; the header is row 1.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config_data import SplitConfig, TaskConfig
from pipeline.errors import CohortError, StorageError
from pipeline.labels import MISSING, NONE, Label, finite, is_missing, lacks, read_label, stratum

SPLITS = ("train", "val", "test")
_RESERVED = ("slide_id", "uri", "patient_id", "split", "mpp", "mask", "coords")
_SHOWN_ROWS = 20  # of each problem; the rest are counted


@dataclass(frozen=True)
class CohortSlide:
    """One row."""

    slide_id: str
    uri: str
    """Absolute path or s3:// URI."""
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
    """URI of a tissue mask: PNG, TIFF, or GeoJSON in level-0 px."""
    coords: str | None = None
    """URI of an HDF5 file of TRIDENT or CLAM with the patches to cut."""


@dataclass(frozen=True)
class Cohort:
    """All rows, in the order of the file."""

    uri: str
    slides: tuple[CohortSlide, ...]

    @property
    def digest(self) -> str:
        """sha256 (hex) over what decides a result: ids, URIs, patients, splits, mpp and labels, in order."""
        hasher = hashlib.sha256()
        for slide in self.slides:
            row = [slide.slide_id, slide.uri, slide.patient_id, slide.split, slide.mpp, dict(slide.labels)]
            row += [slide.mask, slide.coords]
            hasher.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return hasher.hexdigest()

    @property
    def has_splits(self) -> bool:
        """Whether every slide stands in a split."""
        return all(slide.split is not None for slide in self.slides)

    def subset(self, split: str) -> tuple[CohortSlide, ...]:
        """The slides of one split."""
        return tuple(slide for slide in self.slides if slide.split == split)


def read_cohort(uri: str, tasks: Sequence[TaskConfig] = ()) -> Cohort:
    """Read and check a cohort; labels are read for `tasks` only.

    Relative slide URIs are taken from the cohort's folder. A label may be missing where another task has one.

    Raises:
        CohortError: the file or its rows are wrong.
        StorageError: the file cannot be read.
    """
    uri = storage.absolute(uri)
    data = storage.read_bytes(uri)
    columns, rows, problems = _parse(uri, data)
    needed = dict.fromkeys(["slide_id", "uri", *(column for task in tasks for column in task.columns)])
    if missing := [column for column in needed if column not in columns]:
        problems.append(f"missing column{'s' * (len(missing) > 1)} {_names(missing)}; found {_names(columns)}")
    if {"slide_id", "uri"} & set(missing):
        raise CohortError(uri, problems)
    tasks = [task for task in tasks if not set(task.columns) & set(missing)]
    found = _Problems()
    folder = storage.parent(uri)
    slides = tuple(_slide(number, row, folder, tasks, found) for number, row in rows)
    _check_rows([number for number, _ in rows], slides, found)
    problems += found.lines()
    if not rows and not problems:
        problems.append("no rows below the header; list at least one slide")
    if problems:
        raise CohortError(uri, problems)
    return Cohort(uri, slides)


def check_trainable(cohort: Cohort, tasks: Sequence[TaskConfig], splits: Sequence[str] = ("train", "test")) -> None:
    """Raise a CohortError unless each of `splits` has slides, and labels of every task that something shows in."""
    sizes = {split: len(cohort.subset(split)) for split in SPLITS}
    counted = ", ".join(f"{split} {size}" for split, size in sizes.items())
    problems = []
    for split in splits:
        if not sizes[split]:
            problems.append(f"split {split} has no slide ({counted}); add slides or change cohort.split")
            continue
        for task in tasks:
            reason = lacks(task, [slide.labels[task.name] for slide in cohort.subset(split)])
            if reason is not None:
                found, _, remedy = reason.partition("; ")
                problems.append(
                    f"task {task.name}: split {split} has {found} in column {task.column!r}, from which nothing can be "
                    f"learned or measured; {remedy}"
                )
    if problems:
        raise CohortError(cohort.uri, problems)


def with_splits(cohort: Cohort, fractions: SplitConfig, seed: int, tasks: Sequence[TaskConfig]) -> Cohort:
    """Give every patient a split, stratified by the first task's label; unchanged when there are splits.

    A patient's stratum is the highest (`labels.stratum`) of its slides. The result depends on the
    seed, the patients' ids and their labels alone, not on the order of the rows. A class with at least as many
    patients as there are splits stands in each of them.
    """
    if cohort.has_splits:
        return cohort
    strata: defaultdict[int, list[str]] = defaultdict(list)
    for patient, rank in _strata(cohort, tasks).items():
        strata[rank].append(patient)
    split_of: dict[str, str] = {}
    for patients in strata.values():
        patients.sort(key=lambda patient: hashlib.sha256(f"{seed}\0{patient}".encode()).digest())
        names = [name for name, size in _shares(len(patients), fractions).items() for _ in range(size)]
        split_of.update(zip(patients, names, strict=True))
    return replace(cohort, slides=tuple(replace(slide, split=split_of[slide.patient_id]) for slide in cohort.slides))


def _strata(cohort: Cohort, tasks: Sequence[TaskConfig]) -> dict[str, int]:
    """Patient -> highest stratum of its slides in the first task, -1 when it has no label."""
    strata: dict[str, int] = {}
    for slide in cohort.slides:
        rank = stratum(tasks[0], slide.labels[tasks[0].name]) if tasks else -1
        strata[slide.patient_id] = max(rank, strata.get(slide.patient_id, -1))
    return strata


def _shares(patients: int, fractions: SplitConfig) -> dict[str, int]:
    """How many patients of a stratum go where: largest remainders, but no split empty while another has two."""
    wanted = {name: getattr(fractions, name) for name in ("train", "test", "val")}
    wanted = {name: share for name, share in wanted.items() if share > 0}
    if patients <= len(wanted):
        return {name: int(place < patients) for place, name in enumerate(wanted)}
    sizes = {name: int(patients * share) for name, share in wanted.items()}
    by_remainder = sorted(wanted, key=lambda name: sizes[name] - patients * wanted[name])
    for name in by_remainder[: patients - sum(sizes.values())]:
        sizes[name] += 1
    for name in wanted:
        if not sizes[name]:
            sizes[max(sizes, key=lambda other: sizes[other])] -= 1
            sizes[name] = 1
    return sizes


class _Problems:
    """What is wrong, each with the rows it is wrong in."""

    def __init__(self) -> None:
        self._rows: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, row: int, text: str) -> None:
        self._rows[text].append(row)

    def lines(self) -> list[str]:
        return [f"{_rows(rows)}: {text}" for text, rows in sorted(self._rows.items(), key=lambda item: item[1])]


def _rows(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN_ROWS]))
    more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
    return f"row{'s' * (len(rows) > 1)} {shown}{more}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


_Rows = list[tuple[int, dict[str, str]]]


def _parse(uri: str, data: bytes) -> tuple[list[str], _Rows, list[str]]:
    """Columns, numbered rows as text, and what is wrong with the table as such."""
    if not data:
        raise CohortError(uri, ["the file is empty (0 bytes); write a header and at least one slide"])
    return _parse_parquet(uri, data) if data[:4] == b"PAR1" else _parse_csv(uri, data)


def _parse_csv(uri: str, data: bytes) -> tuple[list[str], _Rows, list[str]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CohortError(
            uri, [f"row {line}: byte {data[error.start]:#04x} is not UTF-8; save the file as CSV UTF-8 or Parquet"]
        ) from error
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise CohortError(uri, [f"not a CSV file: {error}; close every quote, or use Parquet"]) from error
    columns = [name.strip() for name in lines[0]] if lines else []
    problems = [
        f"column {name!r} stands twice in the header" for name in dict.fromkeys(columns) if columns.count(name) > 1
    ]
    rows: _Rows = []
    for number, values in enumerate(lines[1:], start=2):
        if len(values) == len(columns):
            rows.append((number, {name: value.strip() for name, value in zip(columns, values, strict=True)}))
        elif values:  # a blank line has no values
            problems.append(
                f"row {number}: {len(values)} fields, the header has {len(columns)}; quote values with commas"
            )
    return columns, rows, problems


def _parse_parquet(uri: str, data: bytes) -> tuple[list[str], _Rows, list[str]]:
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise CohortError(uri, [f"not a readable Parquet file ({error}); write it again"]) from error
    columns = [str(name) for name in table.column_names]
    rows = [
        (number, {name: _text(value) for name, value in row.items()})
        for number, row in enumerate(table.to_pylist(), start=2)
    ]
    return columns, rows, []


def _text(value: object) -> str:
    """A Parquet value as CSV would hold it."""
    if value is None:
        return ""
    if isinstance(value, list):  # the labels of a multilabel task
        return ";".join(map(_text, value)) or NONE
    return str(int(value) if isinstance(value, bool) else value).strip()


def _slide(
    number: int, row: Mapping[str, str], folder: str, tasks: Sequence[TaskConfig], problems: _Problems
) -> CohortSlide:
    for column in ("slide_id", "uri"):
        if not row[column]:
            problems.add(number, f"{column} is empty")
    split = row.get("split", "")
    if split and split not in SPLITS:
        problems.add(number, f"split {split!r} is not one of {_names(SPLITS)}")
    labels = {task.name: _label(number, row, task, problems) for task in tasks}
    if tasks and all(is_missing(task, row) for task in tasks):
        problems.add(number, f"no label in column {_names(dict.fromkeys(task.column for task in tasks))}")
    used = {*_RESERVED, *(column for task in tasks for column in task.columns)}
    return CohortSlide(
        slide_id=row["slide_id"],
        uri=_resolve(row["uri"], folder, number, problems),
        patient_id=row.get("patient_id") or row["slide_id"],
        split=split or None,
        mpp=_mpp(number, row.get("mpp", ""), problems),
        labels=labels,
        extra={name: value for name, value in row.items() if name not in used},
        mask=_beside("mask", row, folder, number, problems),
        coords=_beside("coords", row, folder, number, problems),
    )


def _beside(column: str, row: Mapping[str, str], folder: str, number: int, problems: _Problems) -> str | None:
    """The URI of a file that belongs to the slide; None where the column is absent or empty."""
    text = row.get(column, "")
    return None if text.casefold() in MISSING else _resolve(text, folder, number, problems, column)


def _resolve(uri: str, folder: str, row: int, problems: _Problems, column: str = "uri") -> str:
    """The absolute URI; what is relative starts in the cohort's folder."""
    try:
        relative = not storage.is_remote(uri) and not uri.startswith(("/", "~", "file://"))
        return storage.absolute(storage.join(folder, uri) if relative else uri)
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


def _label(number: int, row: Mapping[str, str], task: TaskConfig, problems: _Problems) -> Label | None:
    try:
        return read_label(task, row)
    except ValueError as error:
        problems.add(number, str(error))
        return None


def _check_rows(numbers: Sequence[int], slides: Sequence[CohortSlide], problems: _Problems) -> None:
    """What only shows across rows: double ids, patients in two splits, splits that are given in part."""
    ids: defaultdict[str, list[int]] = defaultdict(list)
    splits: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for number, slide in zip(numbers, slides, strict=True):
        ids[slide.slide_id].append(number)
        if slide.split in SPLITS:
            splits[slide.patient_id].setdefault(slide.split, number)
    for slide_id, rows in ids.items():
        for row in rows if slide_id and len(rows) > 1 else ():
            problems.add(row, f"slide_id {slide_id!r} is not unique")
    for patient, first in splits.items():
        for row in first.values() if patient and len(first) > 1 else ():
            problems.add(row, f"patient {patient!r} stands in {len(first)} splits ({', '.join(first)}); keep one")
    if splits:
        for number, slide in zip(numbers, slides, strict=True):
            if slide.split is None:
                problems.add(number, "split is empty; give every slide a split, or none of them")
