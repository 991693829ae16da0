"""A cohort file's bytes as columns and numbered rows of text: CSV as spreadsheets of any country write it, or Parquet.

The text is UTF-8, with or without its mark, or UTF-16 with one. The separator is that of `,` `;` tab and `|` under
which the header has `slide_id` and `uri`, or the one that a spreadsheet's first line `sep=;` names. Spaces around a
value, empty cells beyond the header, columns without a name and rows of empty cells say nothing. Rows are numbered
from 1, as in a spreadsheet.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cohort.labels import NONE
from pipeline.errors import CohortError

REQUIRED = ("slide_id", "uri")
Rows = Iterator[tuple[int, dict[str, str]]]
"""One at a time: a million of them together take gigabytes."""

BATCH = 8192  # rows of a Parquet file held as Python objects

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_NAMED = re.compile(r"sep=(.)\s*", re.IGNORECASE)
_OTHERS = {
    b"PK\x03\x04": "a workbook (xlsx) or archive",
    b"\xd0\xcf\x11\xe0": "a workbook (xls)",
    b"\x1f\x8b": "gzipped",
}


def parse(uri: str, data: bytes) -> tuple[list[str], Rows, list[str]]:
    """Columns, numbered rows as text, and what is wrong with the table as such, of which rows tell as they come.

    Raises:
        CohortError: it is no table; also where that shows in a row.
    """
    if not data:
        raise CohortError(uri, ["the file is empty (0 bytes); write a header and at least one slide"])
    if data[:4] == b"PAR1":
        return _parse_parquet(uri, data)
    try:
        columns, rows, problems = _parse_csv(_decoded(data))
    except ValueError as error:
        raise CohortError(uri, [str(error)]) from error
    return columns, _told(uri, rows), problems


def _told(uri: str, rows: Rows) -> Rows:
    try:
        yield from rows
    except ValueError as error:
        raise CohortError(uri, [str(error)]) from error


def _decoded(data: bytes) -> str:
    """The text; ValueError says what is wrong with it."""
    for start, what in _OTHERS.items():
        if data.startswith(start):
            raise ValueError(f"the file is {what}, not CSV or Parquet; unpack it, or save it as CSV UTF-8")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if not wide and b"\0" in data:
        raise ValueError("the file holds NUL bytes: it is no text, or UTF-16 without its mark; save it as CSV UTF-8")
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        if wide:
            raise ValueError("the file ends within a character of UTF-16; save it again, as CSV UTF-8") from error
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise ValueError(f"row {line}: byte {byte:#04x} is not UTF-8; save the file as CSV UTF-8 or Parquet") from error


def _parse_csv(text: str) -> tuple[list[str], Rows, list[str]]:
    """ValueError where the text cannot be cut into cells."""
    first = text.partition("\n")[0]
    named = _NAMED.fullmatch(first)
    separator = named[1] if named else _separator(text)
    lines = _cells(text, separator)
    if named:
        next(lines)
    header = next(lines, [])
    names = _trimmed(header)
    columns = [name for name in names if name]  # pandas writes its index without one
    problems = [
        f"column {name!r} stands twice in the header" for name in dict.fromkeys(columns) if columns.count(name) > 1
    ]
    return columns, _rows(lines, names, separator, 3 if named else 2, problems), problems


def _rows(lines: Iterator[list[str]], names: Sequence[str], separator: str, first: int, problems: list[str]) -> Rows:
    for number, cells in enumerate(lines, start=first):
        values = _trimmed(cells)
        if values and (len(cells) < len(names) or len(values) > len(names)):
            problems.append(
                f"row {number}: {len(cells)} field{'s' * (len(cells) != 1)}, the header has {len(names)}; quote values "
                f"with {_SEPARATORS.get(separator, repr(separator))}"
            )
        elif values:
            values += [""] * (len(names) - len(values))
            yield number, {name: value for name, value in zip(names, values, strict=True) if name}


def _separator(text: str) -> str:
    """That under which the header has what it needs, else that which cuts it into the most columns."""

    def merit(separator: str) -> tuple[bool, int]:
        header = _header(text, separator)
        return set(REQUIRED) <= set(header), len(header)

    return max(_SEPARATORS, key=merit)


def _header(text: str, separator: str) -> list[str]:
    try:
        return _trimmed(next(_reader(text, separator), []))
    except csv.Error:
        return []


def _cells(text: str, separator: str) -> Iterator[list[str]]:
    try:
        yield from _reader(text, separator)
    except csv.Error as error:
        raise ValueError(f"not a CSV file: {error}; close every quote, or use Parquet") from error


def _reader(text: str, separator: str) -> Iterator[list[str]]:
    lines = io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8", newline="")  # StringIO takes 4 bytes a letter
    return csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)


def _trimmed(cells: Sequence[str]) -> list[str]:
    """Without spaces around each, and without the empty ones at the end."""
    values = [cell.strip() for cell in cells]
    while values and not values[-1]:
        values.pop()
    return values


def _parse_parquet(uri: str, data: bytes) -> tuple[list[str], Rows, list[str]]:
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise CohortError(uri, [f"not a readable Parquet file ({error}); write it again"]) from error
    columns = [str(name) for name in table.column_names]
    records = (record for batch in table.to_batches(BATCH) for record in batch.to_pylist())
    rows = ((number, {name: _text(value) for name, value in row.items()}) for number, row in enumerate(records, 2))
    return columns, rows, []


def _text(value: object) -> str:
    """A Parquet value as CSV would hold it."""
    if value is None:
        return ""
    if isinstance(value, list):  # the labels of a multilabel task
        return ";".join(map(_text, value)) or NONE
    return str(int(value) if isinstance(value, bool) else value).strip()
