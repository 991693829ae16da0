from __future__ import annotations

import io
import sys

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.formats.hdf5 import datasets_of, load_h5py, patch_extent, row_offsets, written


@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 7),
    chunk=st.sampled_from([None, 1, 3, 32]),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_rows_are_where_the_offsets_say(rows: int, width: int, chunk: int | None, dtype: str) -> None:
    array = np.random.default_rng(rows).normal(size=(rows, width)).astype(dtype)
    data = written({"more": np.arange(rows), "x": array}, chunk)
    with h5py.File(io.BytesIO(data)) as file:
        assert np.array_equal(file["x"][:], array)
        offsets = row_offsets(file["x"])
    assert [data[start : start + array[0].nbytes] for start in offsets.tolist()] == [row.tobytes() for row in array]


def test_what_cannot_be_read_by_ranges_is_said_with_what_mends_it() -> None:
    sink, array = io.BytesIO(), np.zeros((20, 6), np.float32)
    with h5py.File(sink, "w") as file:
        file.create_dataset("packed", data=array, compression="gzip")
        file.create_dataset("cut", data=array, chunks=(4, 3))
        file.create_dataset("half", shape=(20, 6), dtype="f4", chunks=(4, 6))[:9] = 1
        file.create_dataset("none", shape=(20, 6), dtype="f4")
        file.create_group("group")
        assert sorted(datasets_of(file)) == ["cut", "half", "none", "packed"]
    with h5py.File(sink) as file:
        for name, problem in {
            "packed": "stored compressed (gzip); h5repack -f NONE",
            "cut": "hold parts of rows; h5repack -l CONTI",
            "half": "2 of its 5 chunks were never written, from row 12 on",
            "none": "its rows were never written",
        }.items():
            with pytest.raises(ValueError, match=r".") as caught:
                row_offsets(file[name])
            assert problem in str(caught.value)


def test_attributes_of_the_file_and_of_its_datasets() -> None:
    data = written({"x": np.zeros((2, 3))}, None, x={"encoder": "uni"}, file={"unit": "um"})
    with h5py.File(io.BytesIO(data)) as file:
        assert (dict(file.attrs), dict(file["x"].attrs)) == ({"unit": "um"}, {"encoder": "uni"})


def test_a_patch_s_edge_and_step_by_each_tool_s_attributes() -> None:
    assert patch_extent({"patch_size": 512, "patch_size_level0": 1024, "overlap": 64}) == ("trident", 1024, 896)
    assert patch_extent({"patch_size": 256, "downsample": (4.5, 4.0)}) == ("clam", 1152, 1152)
    with pytest.raises(LookupError):
        patch_extent({"patch_size": 256})


def test_without_h5py_it_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"need h5py, which is absent.*pip install 'ips-pipeline\[interchange\]'"):
        load_h5py()
