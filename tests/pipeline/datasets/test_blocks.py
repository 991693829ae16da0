from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.datasets import blocks
from pipeline.datasets.opened import open_store
from tests.pipeline.datasets.made import DIM, as_written


@pytest.mark.ray
@pytest.mark.slow
def test_all_rows_come_once(ray_session: None, patches: Path, features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ROWS", 7)
    found = {(row["key"], row["row"]): (row["x"], row["y"], row["image"])
             for row in open_store(str(patches)).ray().iter_rows()}  # fmt: skip
    assert found == {(key, row): place for key, rows in as_written(patches).items() for row, place in enumerate(rows)}
    store = open_store(str(features))
    vectors = store.ray([*store][1:]).sort(["key", "row"]).take(21)
    assert list(vectors[20]["feature"]) == [200 + k / 2 for k in range(DIM)]


def test_a_portion_is_read_from_what_its_row_says(patches: Path) -> None:
    import pyarrow as pa

    for slide in open_store(str(patches)):
        row = {**blocks._reference(slide), "start": 3, "stop": 17}
        table = blocks._read(pa.Table.from_pylist([row]))
        expected = as_written(patches)[slide.key][3:17]
        assert [(r["x"], r["y"], r["image"]) for r in table.to_pylist()] == expected
        assert table["row"].to_pylist() == list(range(3, 17))
