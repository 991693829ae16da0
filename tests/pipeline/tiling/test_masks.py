"""Masks that somebody else made."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from PIL import ExifTags, Image

from pipeline.errors import SlideError
from pipeline.tiling.masks import ExternalMask
from pipeline.units import Box

DIMENSIONS = (1013, 787)
HOUSE = [[100, 200], [600, 150], [640, 500], [350, 700], [90, 520], [100, 200]]
WINDOW = [[300, 300], [420, 310], [410, 430], [290, 420], [300, 300]]
INSIDE = [[340, 340], [380, 340], [380, 390], [340, 390], [340, 340]]


def geojson(*geometries: dict[str, Any], **properties: object) -> bytes:
    features = [{"type": "Feature", "geometry": geometry, "properties": properties} for geometry in geometries]
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()


def polygon(*rings: list[list[int]]) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": rings}


def mask(data: bytes, name: str = "a.geojson", width: int = 203, height: int = 157) -> np.ndarray:
    return ExternalMask(name, data).at(width, height, DIMENSIONS)


def inside(ring: list[list[int]], width: int = 203, height: int = 157) -> np.ndarray:
    """The oracle: is the centre of a px inside the ring?"""
    x, y = np.meshgrid((np.arange(width) + 0.5) * 1013 / width, (np.arange(height) + 0.5) * 787 / height)
    found = Outline(np.array(ring)).contains_points(np.stack([x.ravel(), y.ravel()], 1))
    return np.asarray(found.reshape(height, width))


def test_a_polygon_with_a_hole_and_something_in_the_hole() -> None:
    found = mask(geojson(polygon(HOUSE, WINDOW), polygon(INSIDE)))
    wanted = (inside(HOUSE) & ~inside(WINDOW)) | inside(INSIDE)
    assert found.shape == (157, 203)
    assert (found != wanted).mean() < 0.004  # px that an edge runs through
    assert not found[int(320 / 5), int(310 / 5)]
    assert found[int(365 / 5), int(360 / 5)]


@settings(max_examples=40, deadline=None)
@given(
    left=st.integers(-200, 1100),
    top=st.integers(-200, 900),
    width=st.integers(40, 900),
    height=st.integers(40, 900),
)
def test_rectangles_anywhere_cover_their_area(left: int, top: int, width: int, height: int) -> None:
    ring = [[left, top], [left + width, top], [left + width, top + height], [left, top + height], [left, top]]
    found = mask(geojson(polygon(ring)), width=1013 // 4, height=787 // 4)
    across = max(0, min(1013, left + width) - max(0, left)) * max(0, min(787, top + height) - max(0, top))
    assert abs(found.mean() - across / (1013 * 787)) < 2 * (width + height) * 4 / (1013 * 787)


@pytest.mark.parametrize(
    "document",
    [
        polygon(HOUSE),
        {"type": "MultiPolygon", "coordinates": [[HOUSE]]},
        {"type": "GeometryCollection", "geometries": [polygon(HOUSE)]},
        [{"type": "Feature", "geometry": polygon(HOUSE)}],  # QuPath before 0.3
    ],
)
def test_every_way_to_write_an_area(document: object) -> None:
    assert (mask(json.dumps(document).encode()) == mask(geojson(polygon(HOUSE)))).all()


def test_what_is_null_or_empty_has_no_area() -> None:
    empty: list[dict[str, Any]] = [
        {"type": "Polygon", "coordinates": []},
        {"type": "MultiPolygon", "coordinates": [[], [HOUSE]]},
    ]
    data = json.loads(geojson(*empty))
    data["features"].append({"type": "Feature", "geometry": None, "properties": {}})
    assert (mask(json.dumps(data).encode()) == mask(geojson(polygon(HOUSE)))).all()


def test_what_qupath_ignores_is_no_tissue() -> None:
    data = json.loads(geojson(polygon(HOUSE)))
    data["features"].append(json.loads(geojson(polygon(INSIDE), classification={"name": "Ignore*"}))["features"][0])
    assert (mask(json.dumps(data).encode()) == mask(geojson(polygon(HOUSE)))).all()


@given(left=st.integers(0, 500), top=st.integers(0, 400), seed=st.integers(0, 99))
def test_outlines_count_from_the_corner_of_the_bounds(left: int, top: int, seed: int) -> None:
    """QuPath shows nothing else of a slide."""
    ring = np.random.default_rng(seed).integers(0, 400, (5, 2))
    on_slide, in_qupath = (geojson(polygon(points.tolist())) for points in (ring + np.array([left, top]), ring))
    found = ExternalMask("a.geojson", in_qupath).at(203, 157, DIMENSIONS, Box(left, top, 500, 380))
    assert (found == mask(on_slide)).all()


@settings(deadline=None)
@given(left=st.integers(0, 413), top=st.integers(0, 587), finer=st.sampled_from([0.07, 0.25, 1.0]))
def test_an_image_of_the_bounds_lies_there(left: int, top: int, finer: float) -> None:
    """600 x 200 px of a slide that is nearly square; the right half of them is tissue."""
    size = (round(600 * finer), round(200 * finer))
    part = np.zeros(size[::-1], np.uint8)
    part[:, size[0] // 2 :] = 9
    found = ExternalMask("a.png", png(Image.fromarray(part))).at(203, 157, DIMENSIONS, Box(left, top, 600, 200))
    x, y = (np.arange(203) + 0.5) * 1013 / 203, (np.arange(157) + 0.5) * 787 / 157
    across, down = (x > left + 300) & (x < left + 600), (y > top) & (y < top + 200)
    assert (found == down[:, None] & across).mean() > 0.995  # px that an edge runs through
    assert not found[:, x < left + 290].any()


def test_an_image_of_the_whole_slide_stays_one_whatever_the_bounds() -> None:
    assert (
        ExternalMask("a.png", image("L")).at(203, 157, DIMENSIONS, Box(100, 60, 300, 100)) == mask(image("L"), "a.png")
    ).all()
    with pytest.raises(SlideError, match="the whole slide, or all of its bounds"):
        ExternalMask("a.png", image("L", (100, 400))).at(203, 157, DIMENSIONS, Box(100, 60, 300, 100))


def png(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, format="PNG")
    return sink.getvalue()


def image(mode: str, size: tuple[int, int] = (405, 315), **options: Any) -> bytes:
    """Tissue in the left third, written as 1, 255 or a colour."""
    left = np.zeros((size[1], size[0]), np.uint8)
    left[:, : size[0] // 3] = 1
    picture = {
        "1": lambda: Image.fromarray(left.astype(bool)),
        "L": lambda: Image.fromarray(left),
        "P": lambda: Image.fromarray(left).convert("P"),
        "P, tissue first": lambda: Image.fromarray(left[..., None] * np.full(3, 255, np.uint8)).quantize(2),
        "RGBA": lambda: Image.fromarray(np.where(left[..., None], [0, 0, 255, 255], [0, 0, 0, 255]).astype(np.uint8)),
        "alpha": lambda: Image.fromarray(np.where(left[..., None], 255, [255, 255, 255, 0]).astype(np.uint8)),
        "LA": lambda: Image.fromarray(np.where(left[..., None], 255, [255, 0]).astype(np.uint8)),
        "RGB": lambda: Image.fromarray(left[..., None] * np.array([0, 0, 255], np.uint8)),
        "I;16": lambda: Image.fromarray(left.astype(np.uint16) * 1000),
    }[mode]()
    sink = io.BytesIO()
    picture.save(sink, **{"format": "PNG", **options})
    return sink.getvalue()


def test_a_palette_may_begin_with_the_colour_of_the_tissue() -> None:
    data = image("P, tissue first", (405, 315))
    assert Image.open(io.BytesIO(data)).getpalette() == [255, 255, 255, 0, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "P, tissue first", "RGB", "RGBA", "alpha", "LA", "I;16"])
def test_any_kind_of_image_with_tissue_above_0(mode: str) -> None:
    found = mask(image(mode), "a.png")
    assert found[:, :67].all()
    assert not found[:, 69:].any()


@pytest.mark.parametrize("stored", [3, 6, 8])
def test_a_mask_that_is_stored_turned_is_read_upright(stored: int) -> None:
    """As each program shows it that follows EXIF."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = stored
    upright = Image.open(io.BytesIO(image("L")))
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[stored]
    sink = io.BytesIO()
    upright.transpose(back).save(sink, format="PNG", exif=exif)
    assert np.array_equal(mask(sink.getvalue(), "a.png"), mask(image("L"), "a.png"))


def test_the_page_of_a_pyramid_that_suffices_is_read() -> None:
    large = Image.fromarray(np.ones((787, 1013), np.uint8))  # would be tissue all over
    small = Image.open(io.BytesIO(image("L", (253, 197))))
    sink = io.BytesIO()
    large.save(sink, format="TIFF", save_all=True, append_images=[small], compression="tiff_lzw")
    assert mask(sink.getvalue(), "a.tif").mean() == pytest.approx(1 / 3, abs=0.01)
    assert mask(sink.getvalue(), "a.tif", 507, 394).all()


def spoilt_tiff() -> bytes:
    """Pillow's word on tiles that are 0 px wide is a ValueError."""
    sink = io.BytesIO()
    tifffile.imwrite(sink, np.ones((157, 203), np.uint8), tile=(32, 32))
    data = sink.getvalue()
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        at = tiff.pages.first.tags["TileWidth"].valueoffset
    return data[:at] + bytes(2) + data[at + 2 :]


@pytest.mark.parametrize(
    ("data", "name", "said"),
    [
        (b"junk", "a.png", "PNG or TIFF"),
        (image("L")[:200], "a.png", "cannot be decoded"),
        (image("L", (315, 405)), "a.png", "neither turned nor cropped"),
        (b"{}", "a.geojson", "not GeoJSON"),
        (b"{", "a.geojson", "not GeoJSON"),
        (b"[" * 100_000, "a.geojson", "not GeoJSON .*; export the annotations again"),
        (geojson({"type": "Polygon", "coordinates": []}), "a.geojson", "no Polygon"),
        (geojson({"type": "Polygon", "coordinates": [[]]}), "a.geojson", "not GeoJSON"),
        (geojson(polygon([[10**30, 0], [1, 10**30], [5, 5]])), "a.geojson", "all of which must be px"),
        (spoilt_tiff(), "a.tif", "cannot be decoded .*; write it again"),
        (geojson({"type": "Point", "coordinates": [1, 2]}), "a.geojson", "no Polygon"),
        (geojson(polygon([["x", "y"]])), "a.geojson", "not GeoJSON"),  # type: ignore[list-item]
    ],
)
def test_a_file_that_is_no_mask_says_so(data: bytes, name: str, said: str) -> None:
    with pytest.raises(SlideError, match=said) as caught:
        mask(data, name)
    assert caught.value.reason == "mask"
