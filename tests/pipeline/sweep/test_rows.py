"""Rows are only ever added, and each source counts once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DamagedError
from pipeline.schema import SWEEP_ROWS
from pipeline.sweep.rows import Row, RowStore, contents_of, done_sources


def _row(source: str, scoring: str = "one", **changes: Any) -> Row:
    plain: Row = {field.name: None if field.nullable else 0 for field in SWEEP_ROWS}
    plain |= {"scoring": scoring, "source": source, "slide_id": source, "precision": "float32", "device": "CPU"}
    return {**plain, "outputs": [0.25, 0.75], **changes}


def test_what_is_added_is_read_by_scoring(tmp_path: Path) -> None:
    store = RowStore(str(tmp_path))
    store.add([_row("b"), _row("a"), _row("a", "two", outputs=[0.5, 0.5])])
    store.add([_row("c")])
    assert store.read("one")["source"].to_pylist() == ["a", "b", "c"]
    assert store.read("two")["outputs"].to_pylist() == [[0.5, 0.5]]
    assert store.read("none").num_rows == 0
    assert store.read("none").schema.equals(SWEEP_ROWS)


def test_equal_rows_are_one_file(tmp_path: Path) -> None:
    store = RowStore(str(tmp_path))
    for _ in range(2):
        store.add([_row("a")])
    assert len(list(tmp_path.rglob("*.parquet"))) == 1


def test_a_prediction_stands_before_a_failure_and_the_last_failure_before_others(tmp_path: Path) -> None:
    store = RowStore(str(tmp_path))
    store.add(
        [
            _row("a", outputs=None, reason="missing", message="late", finished=9.0),
            _row("b", outputs=None, reason="crash", finished=1.0),
        ]
    )
    store.add([_row("a", finished=2.0), _row("b", outputs=None, reason="empty-file", finished=3.0)])
    table = store.read("one")
    assert table["source"].to_pylist() == ["a", "b"]
    assert table["reason"].to_pylist() == [None, "empty-file"]


def test_failures_that_may_pass_are_tried_again(tmp_path: Path) -> None:
    store = RowStore(str(tmp_path))
    reasons = {"a": None, "b": "missing", "c": "empty-file", "d": "crash"}
    store.add([_row(source, reason=reason) for source, reason in reasons.items()])
    assert done_sources(store.read("one")) == {"a", "c"}


def test_what_slides_were_found_to_be_is_gathered() -> None:
    import pyarrow as pa

    tables = {
        "one": pa.Table.from_pylist([_row("a", key="k1", content="c"), _row("b")], SWEEP_ROWS),
        "two": pa.Table.from_pylist([_row("a", key="k2", content="c")], SWEEP_ROWS),
    }
    assert contents_of(tables) == {"a": {"k1", "k2", "c"}, "b": set()}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    store = RowStore(str(tmp_path))
    store.add([_row("a")])
    (path,) = tmp_path.rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamagedError, match=f"{path.name}.*remove it"):
        store.read("one")
