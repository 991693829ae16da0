"""Objects in columns are the objects that were put in."""

from __future__ import annotations

import pickle

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import columnar
from pipeline.columnar import Columnar, with_columns

Pair = tuple[str | None, int | None]
SCHEMA = pa.schema([("text", pa.string()), ("number", pa.int64())])
ROWS = st.lists(st.tuples(st.none() | st.text(st.characters(), max_size=3), st.none() | st.integers(-9, 9)), max_size=9)


def pair(text: str | None, number: int | None) -> Pair:
    return text, number


@settings(deadline=None)
@given(ROWS, st.integers(1, 4), st.slices(9))
def test_it_is_the_list_that_it_was_made_of(rows: list[Pair], batch: int, part: slice) -> None:
    """Also with halves of characters, which `st.characters` draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columnar, "BATCH", batch)
        held = Columnar.of(rows, SCHEMA, pair)
        assert held == rows
        assert len(held) == len(rows)
        assert [held[place] for place in range(-len(rows), len(rows))] == rows + rows
        assert held[part] == rows[part]
        assert list(pickle.loads(pickle.dumps(held))) == rows
        others = [number for number, _ in enumerate(rows)]
        assert held.with_column("number", others) == [(text, number) for number, (text, _) in enumerate(rows)]
        for outside in (len(rows), -len(rows) - 1):
            with pytest.raises(IndexError):
                held[outside]
    assert (held == [*rows, ("more", 1)]) is False


def test_two_of_them_go_together() -> None:
    first, second = (Columnar.of([(f"{name}{n}", n) for n in range(5)], SCHEMA, pair) for name in "ab")
    both = first.paired(second)
    assert both == list(zip(first, second, strict=True))
    assert both.table.column_names == ["0.text", "0.number", "1.text", "1.number"]
    assert pickle.loads(pickle.dumps(both[2:]))[1] == (("a3", 3), ("b3", 3))
    assert first.filter(pa.array([True, False, True, False, False])) == [("a0", 0), ("a2", 2)]


def test_columns_that_are_not_there_are_null() -> None:
    found = with_columns(pa.table({"number": [3, 4], "other": [1, 2]}), SCHEMA, ["text", "number"])
    assert found.to_pylist() == [{"text": None, "number": 3}, {"text": None, "number": 4}]
    assert found.schema.types == SCHEMA.types
    assert with_columns(pa.table({"number": [3]}), SCHEMA, ["number"]).num_columns == 1
