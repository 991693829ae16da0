from __future__ import annotations

import csv
import io

import pyarrow as pa
import pytest

from pipeline.results.tables import table_csv, unarmed


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "--"])
def test_what_a_spreadsheet_would_compute_gets_a_mark(text: str) -> None:
    assert unarmed(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "a=1", "a-1", "-", "12.5+", None])
def test_other_text_stays(text: str | None) -> None:
    assert unarmed(text) == text


def test_numbers_and_missing_values_stay() -> None:
    table = pa.table(
        {
            "slide_id": ["=1+1", 'b, "c"', "-d"],
            "tumour_label": pa.array([None, "-", "@x"], pa.string()),
            "value": [-0.5, None, 1e-7],
            "n": [-1, 0, 2],
            "nothing": pa.nulls(3),
        }
    )
    rows = list(csv.DictReader(io.StringIO(table_csv(table).decode())))
    assert [row["slide_id"] for row in rows] == ["'=1+1", 'b, "c"', "'-d"]
    assert [row["tumour_label"] for row in rows] == ["", "-", "'@x"]
    assert [row["value"] for row in rows] == ["-0.5", "", "1e-7"]
    assert [row["n"] for row in rows] == ["-1", "0", "2"]
    assert table_csv(table.slice(0, 0)).decode() == '"slide_id","tumour_label","value","n","nothing"\n'
