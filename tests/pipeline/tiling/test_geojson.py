"""Outlines for QuPath."""

from __future__ import annotations

import gzip
import io
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import ndimage
from shapely.geometry import shape
from shapely.validation import explain_validity

from pipeline.tiling.geojson import collection, feature, square, tissue_geojson, write_collection
from pipeline.tiling.masks import ExternalMask

DIMENSIONS = (1060, 370)


def mask() -> np.ndarray:
    """A piece with a hole at the border, another one inside the hole, and one in the corner."""
    found = np.zeros((37, 106), bool)
    found[0:25, 3:60] = True
    found[5:20, 10:50] = False
    found[9:15, 20:40] = True
    found[30:37, 95:106] = True
    return found


def test_every_piece_is_a_closed_polygon_in_level0_px() -> None:
    document = json.loads(tissue_geojson(mask(), DIMENSIONS))
    assert document["type"] == "FeatureCollection"
    assert len(document["features"]) == 3
    rings = []
    for one in document["features"]:
        assert one["type"] == "Feature"
        assert one["geometry"]["type"] == "Polygon"
        assert one["properties"]["objectType"] == "annotation"
        assert one["properties"]["classification"]["name"] == "Tissue"
        rings += one["geometry"]["coordinates"]
    assert len(rings) == 4
    assert all(ring[0] == ring[-1] and len(ring) >= 4 for ring in rings)
    corners = np.concatenate(rings)
    assert corners.min(axis=0).tolist() == [30, 0]
    assert corners.max(axis=0).tolist() == [1060, 370]


def test_the_outline_read_back_is_the_mask() -> None:
    data = tissue_geojson(mask(), DIMENSIONS)
    assert (ExternalMask("a.geojson", data).at(106, 37, DIMENSIONS) != mask()).mean() < 0.01  # cut corners


def test_outlines_count_from_the_corner_that_is_named() -> None:
    plain, moved = (json.loads(tissue_geojson(mask(), DIMENSIONS, *corner))["features"] for corner in ((), ((70, 0),)))
    for one, other in zip(plain, moved, strict=True):
        for ring, its in zip(one["geometry"]["coordinates"], other["geometry"]["coordinates"], strict=True):
            assert (np.array(ring) - np.array(its) == [70, 0]).all()


@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.95))
def test_any_mask_survives_up_to_single_px(seed: int, share: float) -> None:
    coarse = np.random.default_rng(seed).random((7, 11)) < share
    blocks = np.kron(coarse, np.ones((9, 9), bool))
    data = tissue_geojson(blocks, (11 * 90, 7 * 90))
    if not coarse.any():
        assert json.loads(data)["features"] == []
        return
    again = ExternalMask("a.geojson", data).at(99, 63, (11 * 90, 7 * 90))
    assert (again != blocks).mean() < 0.03


@given(
    seed=st.integers(0, 10_000), scale=st.sampled_from([0.4, 1.0, 1.3, 2.0, 7.3]), smooth=st.sampled_from([0.3, 1.0])
)
@example(seed=248, scale=1.3, smooth=1.0)
def test_every_outline_is_one_that_qupath_takes(seed: int, scale: float, smooth: float) -> None:
    ragged = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(61, 83)), smooth) > 0
    features = json.loads(tissue_geojson(ragged, (round(83 * scale), round(61 * scale)), (3, 5)))["features"]
    for one in features:
        polygon = shape(one["geometry"])
        assert polygon.is_valid, explain_validity(polygon)
        assert polygon.exterior.is_ccw
        assert not any(hole.is_ccw for hole in polygon.interiors)
        assert {type(number) for ring in one["geometry"]["coordinates"] for point in ring for number in point} == {int}
        for ring in one["geometry"]["coordinates"]:
            assert len(ring) >= 4
            assert ring[0] == ring[-1]
            assert all(a != b for a, b in pairwise(ring))
    assert len({one["id"] for one in features}) == len(features)


def test_objects_have_what_qupath_reads() -> None:
    box = feature(
        "a/patch/3", [square(4, 2, 10, 9)], "detection", "Attention", (1, 2, 3), measurements={"a": 0.5}, label="#1"
    )
    assert shape(box["geometry"]).exterior.is_ccw
    assert box["id"] == feature("a/patch/3", [], "annotation", "Other", (0, 0, 0))["id"]
    assert box["id"] != feature("a/patch/4", [], "annotation", "Other", (0, 0, 0))["id"]
    assert box["properties"] == {
        "objectType": "detection",
        "classification": {"name": "Attention", "color": [1, 2, 3]},
        "isLocked": True,
        "name": "#1",
        "measurements": {"a": 0.5},
    }
    assert json.loads(collection([box], maps={"a": "b"})) == {
        "type": "FeatureCollection",
        "maps": {"a": "b"},
        "features": [box],
    }


def test_a_stream_is_the_same_collection() -> None:
    boxes = [feature(str(n), [square(n, n, n + 5, n + 7)], "detection", "A", (0, 0, 0)) for n in range(5)]
    sinks = io.BytesIO(), io.BytesIO()
    for sink in sinks:
        write_collection(sink, iter(boxes), levels=[2])
    assert gzip.decompress(sinks[0].getvalue()) == collection(boxes, levels=[2])
    assert sinks[0].getvalue() == sinks[1].getvalue()
    assert json.loads(collection([]))["features"] == []


def test_a_corner_that_rounding_gives_twice_stays() -> None:
    """In a slide of fewer px than its mask both sides of a corner round to one px."""
    square = np.zeros((40, 40), bool)
    square[8:32, 8:32] = True
    (feature,) = json.loads(tissue_geojson(square, (20, 20)))["features"]
    (ring,) = feature["geometry"]["coordinates"]
    corners = np.array(ring[:-1])
    assert corners.min() == 4
    assert corners.max() == 16
    x, y = np.array(ring).T
    assert abs(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2 >= 12 * 12 - 4  # each corner may be cut by half a px


def test_a_large_mask_gives_a_small_outline() -> None:
    y, x = np.mgrid[0:3001, 0:4003]
    disc = (x - 2000) ** 2 + (y - 1500) ** 2 < 1400**2
    data = tissue_geojson(disc, (40_030, 30_010))
    assert len(data) < 100_000
    (feature,) = json.loads(data)["features"]
    ring = np.array(feature["geometry"]["coordinates"][0], float)
    x0, y0 = ring[:-1].T
    x1, y1 = ring[1:].T
    assert abs((x0 * y1 - x1 * y0).sum() / 2) == pytest.approx(np.pi * 14_000**2, rel=0.01)


def test_specks_are_left_out_and_pieces_stay() -> None:
    found = np.zeros((37, 106), bool)
    found[5, 5] = found[30, 100] = True
    found[10:14, 20:24] = True
    found[11, 21] = False
    (feature,) = json.loads(tissue_geojson(found, DIMENSIONS))["features"]
    (ring,) = feature["geometry"]["coordinates"]
    assert np.array(ring).min(axis=0).tolist() == [200, 100]
