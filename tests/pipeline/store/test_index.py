"""Where patches are: neighbours are read together, and a plan's patches are nowhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StorageError
from pipeline.storage import files
from pipeline.store.index import PatchIndex, folder_index, packed_index, runs
from pipeline.store.packs import write_pack
from tests.pipeline.store.test_packs import small


def test_rows_are_cut_where_bytes_are_missing() -> None:
    length = np.array([7, 5, 3, 11])
    offset = np.array([100, 107, 113, 116])  # one byte between the second and the third
    index = PatchIndex(offset, offset, np.zeros(4, np.int64), offset, length)
    assert [run.tolist() for run in runs(index, np.arange(4))] == [[0, 1], [2, 3]]
    assert [run.tolist() for run in runs(index, np.array([0, 2, 3]))] == [[0], [2, 3]]


def test_patches_of_a_pack_follow_one_another(tmp_path: Path) -> None:
    slides = [small("a", [4, 9]), small("b", [5, 1, 8]), small("c", [0, 0], planned=True)]
    pack = write_pack(slides)
    uri = str(tmp_path / pack.name)
    files.write_bytes(uri, pack.data)
    index = packed_index(uri, pack.places["b"], 3)
    first = pack.places["b"].first
    assert index.offset.tolist() == [first, first + 5, first + 6]
    assert index.length.tolist() == [5, 1, 8]
    assert index.part.tolist() == [0, 0, 0]
    assert index.y.tolist() == [42, 153, 264]
    assert packed_index(uri, pack.places["c"], 2).part.tolist() == [-1, -1]


def test_a_folder_of_other_patches_than_the_catalogue_says_is_not_read(tmp_path: Path) -> None:
    """As where another spec's was put in its place."""
    index = pa.table({name: [0, 1, 2] for name in PatchIndex.__annotations__})
    pq.write_table(index, tmp_path / "index.parquet")
    assert len(folder_index(str(tmp_path), 3)[0].x) == 3
    with pytest.raises(StorageError, match=r"3 patches lie there and the catalogue says 5: .*store repair"):
        folder_index(str(tmp_path), 5)
