"""One cohort as spreadsheets and libraries of several countries write it."""

from __future__ import annotations

import pytest

from pipeline.cohort.rows import parse
from pipeline.errors import CohortError

PLAIN = "slide_id,uri,label,note\na,a.svs,yes,\nb,b c.svs,no,\u00e9 1.5\n"
ROWS = [
    (2, {"slide_id": "a", "uri": "a.svs", "label": "yes", "note": ""}),
    (3, {"slide_id": "b", "uri": "b c.svs", "label": "no", "note": "\u00e9 1.5"}),
]


def parsed(uri: str, data: bytes) -> tuple[list[str], list[tuple[int, dict[str, str]]], list[str]]:
    columns, rows, problems = parse(uri, data)
    return columns, list(rows), problems


@pytest.mark.parametrize(
    "data",
    [
        PLAIN.encode(),
        PLAIN.encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        b"\xfe\xff" + PLAIN.encode("utf-16-be"),
        PLAIN.replace("\n", "\r\n").encode("utf-16"),
        PLAIN.replace("\n", "\r").encode(),
        PLAIN.replace(",", ";").encode(),
        PLAIN.replace(",", "\t").encode(),
        PLAIN.replace(",", " | ").encode(),
        PLAIN.replace(",", " , ").replace("slide_id", "  slide_id").encode(),
        PLAIN.replace("slide_id,uri,label,note", '"slide_id", "uri",  "label","note"').encode(),
        PLAIN.replace("\n", ",,\n").encode(),
        (PLAIN + ",,,\n\n   \n").encode(),
        PLAIN.replace("\nb", "\n1,b").replace("slide_id", ",slide_id").replace("\na", "\n0,a").encode(),
    ],
    ids=[
        "plain", "utf-8 mark", "utf-16", "utf-16 big-endian", "utf-16 windows", "old mac", "semicolons", "tabs", "bars",
        "spaces", "quoted header", "trailing separators", "blank rows", "index of pandas",
    ],
)  # fmt: skip
def test_one_table(data: bytes) -> None:
    assert parsed("c.csv", data) == (["slide_id", "uri", "label", "note"], ROWS, [])


def test_a_spreadsheet_names_its_separator_in_the_first_line() -> None:
    columns, rows, problems = parsed("c.csv", ("sep=;\r\n" + PLAIN.replace(",", ";")).encode("utf-8-sig"))
    assert (columns, problems) == (["slide_id", "uri", "label", "note"], [])
    assert rows == [(number + 1, row) for number, row in ROWS]


def test_a_separator_within_other_cells_is_none() -> None:
    columns, rows, problems = parsed("c.csv", b"slide_id,uri,found;all;b;c\na,b,1;2;3\n")
    assert (columns, problems) == (["slide_id", "uri", "found;all;b;c"], [])
    assert rows == [(2, {"slide_id": "a", "uri": "b", "found;all;b;c": "1;2;3"})]


def test_a_value_beyond_the_header_is_not_dropped_in_silence() -> None:
    _, rows, problems = parsed("c.csv", b"slide_id,uri,\na,b, c\nd,e,\n")
    assert problems == ["row 2: 3 fields, the header has 2; quote values with commas"]
    assert [number for number, _ in rows] == [3]


def test_an_unknown_separator_shows_in_the_header() -> None:
    columns, _, problems = parsed("c.csv", b"slide_id:uri\na:b\n")
    assert (columns, problems) == (["slide_id:uri"], [])


def test_what_is_no_table_raises() -> None:
    with pytest.raises(CohortError, match="a workbook"):
        parse("c.xls", b"\xd0\xcf\x11\xe0\xa1\xb1")
