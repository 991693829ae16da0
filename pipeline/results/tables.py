"""Tables for people: CSV in which a spreadsheet finds nothing to compute."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # OWASP's list of what begins one
_MAY_COMPUTE = r"\A[=+\-@\t\r\n]"
_DASH = "-"  # alone it is no formula, but a slide on which no label holds


def table_csv(table: pa.Table) -> bytes:
    """The table as CSV, its texts `unarmed`: ids, labels and reasons come from files of others."""
    columns = {
        name: pa.array([unarmed(value) for value in column.to_pylist()], column.type)
        if pa.types.is_string(column.type) and pc.any(pc.match_substring_regex(column, _MAY_COMPUTE)).as_py()
        else column
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    sink = io.BytesIO()
    csv.write_csv(pa.table(columns), sink)
    return sink.getvalue()


def unarmed(text: str | None) -> str | None:
    """With a `'` before it where a spreadsheet would take it for a formula."""
    return f"'{text}" if text is not None and text.startswith(_FORMULA) and text != _DASH else text
