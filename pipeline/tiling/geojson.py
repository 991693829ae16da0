"""A tissue mask as GeoJSON that QuPath opens: one annotation a piece.

It is in QuPath's coordinates, as `masks` reads them: level-0 px, counted from the corner of the slide's bounds
(`SlideReader.bounds`), because that is all QuPath shows of an MRXS or Leica slide. Of others it is the slide's corner.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from contourpy import FillType, contour_generator
from PIL import Image

OUTLINE_PX = 1024  # longer edge of the mask that is traced: an outline of a few thousand points
SPECK_PX = 4  # of the traced mask: smaller pieces and holes are left out; nobody edits them, and noise has thousands
_RING = 4  # points of the shortest closed outline; QuPath opens no file with a shorter one
_COLOUR = [46, 139, 87]

Mask = npt.NDArray[np.bool_]


def tissue_geojson(mask: Mask, dimensions: tuple[int, int], corner: tuple[int, int] = (0, 0)) -> bytes:
    """A FeatureCollection of Polygons (outer ring, then holes), closed, in integer level-0 px.

    Args:
        mask: (h, w), True where tissue is.
        dimensions: width and height of the slide, level-0 px.
        corner: x and y that the outlines count from, level-0 px: left and top of the slide's bounds.
    """
    features = [_feature(polygon) for polygon in _polygons(_small(mask), dimensions, corner)]
    document = {"type": "FeatureCollection", "features": features}
    return json.dumps(document, separators=(",", ":")).encode()


def _feature(rings: list[list[list[int]]]) -> dict[str, Any]:
    properties = {"objectType": "annotation", "classification": {"name": "Tissue", "color": _COLOUR}}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": rings}, "properties": properties}


def _small(mask: Mask) -> Mask:
    height, width = mask.shape
    share = min(1.0, OUTLINE_PX / max(mask.shape))
    if share == 1.0:
        return mask
    size = (max(1, round(width * share)), max(1, round(height * share)))
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) >= 128


def _polygons(mask: Mask, dimensions: tuple[int, int], corner: tuple[int, int]) -> list[list[list[list[int]]]]:
    """Rings of every piece. The mask gets a rim of glass, so that outlines close at its border."""
    height, width = mask.shape
    padded = np.pad(mask, 1).astype(np.float32)
    points, offsets = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 2.0)
    scale = np.array([dimensions[0] / width, dimensions[1] / height])
    polygons = []
    for outline, bounds in zip(points, offsets, strict=True):
        # the outline counts from px centres, of the rim on
        corners = np.clip(np.rint((outline - 0.5) * scale), 0, dimensions).astype(int)
        large = [slice(a, b) for a, b in pairwise(bounds) if _area(outline[a:b]) > SPECK_PX]
        if large and large[0].start == bounds[0]:  # else the piece itself is a speck
            rings = [_straightened(corners[part] - corner) for part in large]
            if len(rings[0]) >= _RING:  # px as fine as the slide's: thin pieces have no area in whole px
                polygons.append([ring.tolist() for ring in rings if len(ring) >= _RING])
    return polygons


def _area(ring: npt.NDArray[np.float64]) -> float:
    """Inside a closed ring (shoelace formula)."""
    x, y = ring.T
    return float(abs((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2)


def _straightened(ring: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A closed ring without the points that repeat, or lie on a straight line between, their neighbours.

    Points that repeat go first: both neighbours of a corner that stands twice would say that it bends nothing. Taking
    one point out can make its neighbours repeat or straighten each other, so it is done until nothing changes.
    """
    points = ring[:-1]
    while True:
        points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
        before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
        bends = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
        if bends.all():
            return np.concatenate([points, points[:1]])
        points = points[bends]
