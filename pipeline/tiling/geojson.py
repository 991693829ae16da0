"""GeoJSON that QuPath opens: objects with an id, a class and measurements, and the outlines of a tissue mask.

All is in QuPath's coordinates, as `masks` reads them: level-0 px, counted from the corner of the slide's bounds
(`SlideReader.bounds`), because that is all QuPath shows of an MRXS or Leica slide. Of others it is the slide's corner.
Polygons are valid by the OGC's rules (`outlines`), with whole numbers, and shells that are anticlockwise where y points
up. Ids follow from what an object is, so that two files of one slide name the same objects alike.
"""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.tiling.outlines import Mask, Points, area, pieces, placed

OUTLINE_PX = 1024  # longer edge of the mask that is traced: an outline of a few thousand points
SPECK_PX = 4  # of the traced mask: smaller pieces and holes are left out; nobody edits them, and noise has thousands
_FINEST = 2  # px of the slide in one of the traced mask, at least: what whole numbers can tell apart
_GREEN = (46, 139, 87)
_SPACE = uuid.UUID("6f1d3a52-5e0b-5f0e-9a52-0c7d8f0b6a11")
_LEVEL = 4  # of gzip: half the time of 6 for a tenth more bytes

Kind = Literal["annotation", "detection"]
Rings = Sequence[Points]


def feature(
    key: str,
    rings: Rings | Sequence[Sequence[Sequence[int]]],
    kind: Kind,
    name: str,
    colour: tuple[int, int, int],
    *,
    measurements: Mapping[str, float] | None = None,
    label: str | None = None,
) -> dict[str, Any]:
    """An object of QuPath.

    Args:
        key: that no other object of any slide has; gives the id.
        rings: closed, the shell first.
        kind: annotations are what people edit, detections what programs found.
        name: of the class.
        colour: of the class, 0..255.
        measurements: name -> number.
        label: of this one object.
    """
    properties: dict[str, Any] = {
        "objectType": kind,
        "classification": {"name": name, "color": list(colour)},
        "isLocked": kind == "detection",
    }
    if label is not None:
        properties["name"] = label
    if measurements is not None:
        properties["measurements"] = dict(measurements)
    coordinates = [ring.tolist() if isinstance(ring, np.ndarray) else ring for ring in rings]
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_SPACE, key)),
        "geometry": {"type": "Polygon", "coordinates": coordinates},
        "properties": properties,
    }


def square(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    """The closed ring of a box."""
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def collection(features: Iterable[Mapping[str, Any]], **about: object) -> bytes:
    """A FeatureCollection; `about` are members beside the features, which readers that do not know them pass over."""
    return b"".join(_streamed(features, about))


def write_collection(file: BinaryIO, features: Iterable[Mapping[str, Any]], **about: object) -> None:
    """A FeatureCollection as gzip, in the memory of one feature; equal ones give equal bytes."""
    with gzip.GzipFile("", "wb", _LEVEL, file, mtime=0) as packed:
        for part in _streamed(features, about):
            packed.write(part)


def _streamed(features: Iterable[Mapping[str, Any]], about: Mapping[str, object]) -> Iterator[bytes]:
    head = json.dumps({"type": "FeatureCollection", **about}, separators=(",", ":"))
    yield f'{head[:-1]},"features":['.encode()
    between = b""
    for one in features:
        yield between + json.dumps(one, separators=(",", ":")).encode()
        between = b",\n"
    yield b"]}\n"


def tissue_geojson(mask: Mask, dimensions: tuple[int, int], corner: tuple[int, int] = (0, 0)) -> bytes:
    """A FeatureCollection of annotations, one a piece of tissue, in integer level-0 px.

    Args:
        mask: (h, w), True where tissue is.
        dimensions: width and height of the slide, level-0 px.
        corner: x and y that the outlines count from, level-0 px: left and top of the slide's bounds.
    """
    small = _small(mask, dimensions)
    height, width = small.shape
    scale = (dimensions[0] / width, dimensions[1] / height)
    features = []
    for piece in pieces(small, cut=True):
        if _px(piece.shell) > SPECK_PX:
            kept = [piece.shell, *(hole for hole in piece.holes if _px(hole) > SPECK_PX)]
            rings = [placed(ring, scale, corner) for ring in kept]
            key = json.dumps(["tissue", [ring.tolist() for ring in rings]])
            features.append(feature(key, rings, "annotation", "Tissue", _GREEN))
    return collection(features)


def _px(ring: npt.NDArray[np.int64]) -> float:
    """Px of a mask inside a ring in its half px."""
    return abs(area(ring)) / 4


def _small(mask: Mask, dimensions: tuple[int, int]) -> Mask:
    height, width = mask.shape
    share = min(1.0, OUTLINE_PX / max(mask.shape))
    limits = (edge // _FINEST for edge in dimensions)
    size = tuple(max(1, min(round(edge * share), most)) for edge, most in zip((width, height), limits, strict=True))
    if size == (width, height):
        return mask
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) >= 128
