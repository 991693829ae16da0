from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.datasets.opened import open_store
from pipeline.datasets.slide import arrays
from pipeline.errors import StorageError
from pipeline.ingest.tiler import store_slide
from tests.pipeline.datasets.made import DIM, as_written
from tests.pipeline.small import PATCH
from tests.synth import tissue_rgb, write_pyramid


def test_rows_are_those_that_were_written(patches: Path) -> None:
    written = as_written(patches)
    for slide in open_store(str(patches)):
        expected = written[slide.key]
        rows = [19, 0, 0, 9, 8]
        assert slide.payloads(rows) == [expected[row][2] for row in rows]
        batch = pickle.loads(pickle.dumps(slide)).read(rows)
        assert list(zip(batch.x.tolist(), batch.y.tolist(), strict=True)) == [expected[row][:2] for row in rows]
        assert np.array_equal(batch.data[3], simplejpeg.decode_jpeg(expected[9][2]))
        assert slide.table().to_pylist()[7] == {"row": 7, "x": expected[7][0], "y": expected[7][1]}
        assert slide.facts()["key"] == slide.key
        assert slide.read([]).data.shape == (0, PATCH, PATCH, 3)


@pytest.mark.parametrize("row", [20, -1])
def test_a_row_that_is_not_there_is_named(patches: Path, row: int) -> None:
    with pytest.raises(IndexError, match="rows 0 to 19"):
        open_store(str(patches))["s1"].read([3, row])


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.floats(-50, 260)] * 4))
def test_a_box_gives_the_patches_that_share_area_with_it(patches: Path, box: tuple[float, ...]) -> None:
    left, top, right, bottom = box
    slide = open_store(str(patches))["s2"]
    expected = [
        row
        for row, (x, y, _) in enumerate(as_written(patches)[slide.key])
        if max(x, left) < min(x + PATCH, right) and max(y, top) < min(y + PATCH, bottom)
    ]
    assert slide.rows_in(left, top, right, bottom).tolist() == expected
    assert slide.read_box(left, top, right, bottom).rows.tolist() == expected


def test_a_sample_is_drawn_once_each_and_by_the_seed(patches: Path) -> None:
    slide = open_store(str(patches))["s0"]
    drawn = slide.sample(6, seed=3)
    assert len(set(drawn.rows.tolist())) == 6
    assert np.array_equal(drawn.rows, slide.sample(6, seed=3).rows)
    assert not np.array_equal(drawn.rows, slide.sample(6, seed=4).rows)
    assert slide.sample(99).rows.tolist() == list(range(20))


def test_features_are_read_by_row_and_by_corner(patches: Path, features: Path) -> None:
    store, written = open_store(str(features)), as_written(patches)
    for number, slide in enumerate(store):
        batch = slide.read([4, 19])
        assert (batch.data.dtype.name, batch.data.shape) == ("float16", (2, DIM))
        assert batch.data[1].tolist() == [100 * number + 19 + k / 2 for k in range(DIM)]
        corners = [row for row, (x, y, _) in enumerate(written[slide.key]) if 32 <= x < 97 and 0 <= y < 32]
        assert slide.rows_in(32, 0, 97, 32).tolist() == corners


def test_what_has_neither_patches_nor_features_is_refused() -> None:
    with pytest.raises(StorageError, match="neither"):
        arrays([b""], None, None, None, "here")


def test_what_lies_around_patches_is_given_where_it_was_stored(patches: Path, tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(313, 271), tile=64)
    spec = TilingConfig(patch_px=32, tissue="none", context_mpp=2.0)
    store_slide(CohortSlide("a", str(path), "a", None, None, {}, {}), spec, str(tmp_path / "store"))
    store = open_store(str(tmp_path / "store"))
    slide = store["a"]
    assert store.slides["context_mpp"].to_pylist() == [2.0]
    found = slide.around([7, 0])
    assert found.shape == (2, 32, 32, 3)
    with tifffile.TiffFile(path) as file:
        whole = np.pad(file.pages[2].asarray(), ((50, 50), (50, 50), (0, 0)), constant_values=255)  # level 2
    x, y = (round((int(at[7]) + 16) / 4) - 16 for at in (slide.index().x, slide.index().y))
    assert np.abs(found[0].astype(int) - whole[y + 50 : y + 82, x + 50 : x + 82]).mean() < 6
    assert slide.read([7]).data.shape == (1, 32, 32, 3)
    with pytest.raises(StorageError, match="cut without surroundings"):
        open_store(str(patches))["s1"].around([0])
