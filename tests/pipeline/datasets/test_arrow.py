from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from pipeline.datasets.opened import open_store
from pipeline.errors import StorageError
from tests.pipeline.datasets.made import DIM, as_written


def test_the_table_is_what_was_written(patches: Path) -> None:
    table = open_store(str(patches)).arrow().to_table()
    assert table.column_names == ["key", "cell", "x", "y", "level", "image"]
    found: dict[str, list[tuple[int, int, bytes]]] = {}
    for row in table.to_pylist():
        found.setdefault(row["key"], []).append((row["x"], row["y"], row["image"]))
    assert found == as_written(patches)
    assert set(table["level"].to_pylist()) == {0}


def test_a_filter_by_key_opens_no_other_slide(patches: Path, tmp_path: Path) -> None:
    shutil.copytree(patches, tmp_path / patches.name)
    store = open_store(str(tmp_path))
    data = store.arrow()
    for part in tmp_path.glob("*/*/part-*.arrow"):
        if part.parent.name != store["s1"].key:
            part.unlink()
    chosen = data.to_table(columns=["x", "y"], filter=(ds.field("key") == store["s1"].key) & (ds.field("y") >= 32))
    expected = [{"x": x, "y": y} for x, y, _ in as_written(patches)[store["s1"].key] if y >= 32]
    assert chosen.to_pylist() == expected
    assert data.filter(ds.field("key") == store["s2"].key).count_rows() == 20
    with pytest.raises(StorageError, match="does not exist"):
        data.to_table()


def test_features_are_lists_of_fixed_size(features: Path) -> None:
    table = open_store(str(features)).arrow().to_table()
    assert (table.num_rows, table.schema.field("feature").type.list_size) == (60, DIM)
    assert table["feature"][20 + 3].as_py() == [103 + k / 2 for k in range(DIM)]
