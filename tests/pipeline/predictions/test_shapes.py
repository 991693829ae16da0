from __future__ import annotations

import gzip
import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from shapely import box, union_all
from shapely.geometry import Polygon, shape
from shapely.validation import explain_validity

from pipeline.predictions.shapes import LEVELS, TOP, outlines, top_geojson, top_rows, write_all


def _table(cells: np.ndarray, score: list[float], stride: float = 32.3, size: float = 32.3) -> pa.Table:
    corners = np.rint(cells * stride).astype(np.int64)
    n = len(cells)
    return pa.table({
        "row": np.arange(n), "x": corners[:, 0], "y": corners[:, 1], "size": np.full(n, size, np.float32),
        "score": np.array(score, np.float32), "attention": np.array(score, np.float32) / n,
        "selected": np.arange(n) < 2, "effect_t_yes": np.linspace(-1, 1, n).astype(np.float32),
    })  # fmt: skip


def _facts(origin: tuple[int, int] = (0, 0), size: float = 32.3) -> dict[str, Any]:
    return {
        "slide_id": "a", "origin": list(origin), "patch": size, "levels": list(LEVELS),
        "model": {"source": "m", "digest": "d"}, "maps": {"score": {"version": "score/1"}},
    }  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 7)), min_size=1, max_size=50, unique=True),
    st.sampled_from([(1, 1), (32.3, 32.3), (32.3, 40.7), (20, 33), (126.6, 126.6)]),
)
def test_outlines_cover_the_patches_and_are_valid(cells: list[tuple[int, int]], steps: tuple[float, float]) -> None:
    """Whatever meets at a corner, overlaps, or leaves a gap."""
    stride, size = steps
    x, y = np.rint(np.array(cells) * stride).astype(np.int64).T
    found = []
    for rings in outlines(x, y, size, (0, 0)):
        polygon = Polygon(rings[0], rings[1:])
        assert polygon.is_valid, explain_validity(polygon)
        assert polygon.exterior.is_ccw
        found.append(polygon)
    squares = [box(a, b, np.floor(a + size + 0.5), np.floor(b + size + 0.5)) for a, b in zip(x, y, strict=True)]
    whole, all_ = union_all(squares), union_all(found)
    lost = whole.difference(all_).area
    assert lost <= 2 * len(cells) * (size + 1)  # a px along each side, where patches meet
    if all(abs(a - c) + abs(b - d) != 2 or a == c or b == d for a, b in cells for c, d in cells):  # no corner meets
        assert abs(all_.area - whole.area) <= 4 * len(cells) * (size + 1)


def test_places_of_any_number_are_outlined_on_a_coarser_raster() -> None:
    x, y = np.random.default_rng(3).integers(0, 100_000, (2, 9000))
    found = [Polygon(rings[0], rings[1:]) for rings in outlines(x, y, 50.0, (0, 0))]
    assert all(polygon.is_valid for polygon in found)
    assert len(found) > 100
    assert list(outlines(x[:0], y[:0], 50.0, (0, 0))) == []


def test_the_top_patches_and_the_levels_count_from_the_origin() -> None:
    cells = np.stack(np.divmod(np.arange(63), 7), axis=1)
    score = [0.1] * 60 + [9.0, 40.0, 3.0]
    document = json.loads(top_geojson(_facts((5, 7)), _table(cells, score)))
    patches = [one for one in document["features"] if one["properties"]["objectType"] == "detection"]
    assert len(patches) == TOP
    first = patches[0]["properties"]
    assert (first["name"], first["measurements"]["row"]) == ("#1", 61)
    assert first["measurements"]["score (x uniform)"] == 40
    assert shape(patches[0]["geometry"]).bounds[:2] == (np.rint(8 * 32.3) - 5, np.rint(5 * 32.3) - 7)
    regions = [one["properties"] for one in document["features"] if one["properties"]["objectType"] == "annotation"]
    assert [one["classification"]["name"] for one in regions] == [
        f"Attention >= {level}x uniform" for level in (2, 8, 32)
    ]
    assert document["ips"]["maps"] == {"score": {"version": "score/1"}}
    assert len({one["id"] for one in document["features"]}) == len(document["features"])
    assert top_rows(np.array([1.0, 3.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]


def test_every_patch_is_listed_in_its_order() -> None:
    table = _table(np.stack(np.divmod(np.arange(5000), 50), axis=1), [1.0] * 5000)
    sinks = io.BytesIO(), io.BytesIO()
    for sink in sinks:
        write_all(sink, _facts(), table)
    assert sinks[0].getvalue() == sinks[1].getvalue()
    features = json.loads(gzip.decompress(sinks[0].getvalue()))["features"]
    assert [one["properties"]["measurements"]["row"] for one in features] == list(range(5000))
    assert all(shape(one["geometry"]).is_valid for one in features[::97])
    names = {"row", "score (x uniform)", "attention", "effect_t_yes"}
    assert set(features[3]["properties"]["measurements"]) == names
    assert [features[k]["properties"]["classification"]["name"] for k in (1, 2)] == ["Selected patch", "Patch"]
