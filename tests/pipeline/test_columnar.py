"""Objects in columns are the objects that were put in."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import TypeVar

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import cloudpickle
from ray._private.arrow_serialization import _arrow_table_reduce

from pipeline import columnar
from pipeline.columnar import Columnar, mapped, selected, together, with_columns

Pair = tuple[str | None, int | None]
Held = TypeVar("Held")
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


def through_ray(held: Held, beside: list[pickle.PickleBuffer] | None = None) -> Held:
    """As Ray hands an object to a task: with its own way of writing tables, and data `beside` the pickle."""
    buffers = [] if beside is None else beside
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cloudpickle.CloudPickler.dispatch, pa.Table, _arrow_table_reduce)
        data = cloudpickle.dumps(held, protocol=5, buffer_callback=buffers.append)
    found: Held = pickle.loads(data, buffers=buffers)
    return found


def test_two_of_them_travel_as_ray_sends_them() -> None:
    first, second = (Columnar.of([(f"{name}{n}", n) for n in range(5000)], SCHEMA, pair) for name in "ab")
    both, beside = first.paired(second), list[pickle.PickleBuffer]()
    assert list(through_ray(both[7:4000], beside)) == list(both)[7:4000]
    assert sum(len(buffer.raw()) for buffer in beside) > both.table.nbytes * 3 // 4  # the pickle has none of them


def test_two_of_them_go_together() -> None:
    first, second = (Columnar.of([(f"{name}{n}", n) for n in range(5)], SCHEMA, pair) for name in "ab")
    both = first.paired(second)
    assert both == list(zip(first, second, strict=True))
    assert both.table.column_names == ["0.text", "0.number", "1.text", "1.number"]
    assert pickle.loads(pickle.dumps(both[2:]))[1] == (("a3", 3), ("b3", 3))
    assert first.filter(pa.array([True, False, True, False, False])) == [("a0", 0), ("a2", 2)]


def test_what_is_made_of_items_stays_in_columns_where_they_are() -> None:
    rows: list[Pair] = [("a", 1), ("b", 2), ("c", 3)]
    held = Columnar.of(rows, SCHEMA, pair)
    for items in (held, rows):
        found = mapped(_told, together(selected(items, [True, False, True]), held[:2]))
        assert list(found) == ["('a', 1) with ('a', 1)", "('c', 3) with ('b', 2)"]
        assert isinstance(found, Columnar) == isinstance(items, Columnar)
    assert list(pickle.loads(pickle.dumps(held.map(str)))) == [*map(str, rows)]


def _told(two: tuple[Pair, Pair]) -> str:
    return f"{two[0]} with {two[1]}"


@pytest.mark.parametrize("asked", [None, "system"])
def test_the_allocator_is_the_one_that_was_asked_for(asked: str | None) -> None:
    others = {name: value for name, value in os.environ.items() if name != "ARROW_DEFAULT_MEMORY_POOL"}
    code = "import pyarrow as pa; from pipeline.columnar import choose_allocator as choose; choose(); "
    code += "print(pa.default_memory_pool().backend_name, 'jemalloc' in pa.supported_memory_backends())"
    env = others if asked is None else {**others, "ARROW_DEFAULT_MEMORY_POOL": asked}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    backend, has_it = found.split()
    assert backend == asked if asked else (backend == "jemalloc") == (has_it == "True")


def test_columns_that_are_not_there_are_null() -> None:
    found = with_columns(pa.table({"number": [3, 4], "other": [1, 2]}), SCHEMA, ["text", "number"])
    assert found.to_pylist() == [{"text": None, "number": 3}, {"text": None, "number": 4}]
    assert found.schema.types == SCHEMA.types
    assert with_columns(pa.table({"number": [3]}), SCHEMA, ["number"]).num_columns == 1
