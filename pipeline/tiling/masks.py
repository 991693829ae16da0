"""Tissue masks that somebody else made: an image of any resolution, or GeoJSON in level-0 px as QuPath writes it.

QuPath shows of a slide what lies in its bounds (`SlideReader.bounds`) and counts from their corner, so GeoJSON does.
An image shows the whole slide, or the bounds alone where only their shape is its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageSequence, UnidentifiedImageError

from pipeline.errors import SlideError
from pipeline.slides.turned import orientation, upright, upright_size
from pipeline.storage import files
from pipeline.units import Box

Mask = npt.NDArray[np.bool_]
Ring = npt.NDArray[np.float64]

FORMATS = ("PNG", "TIFF")
MAX_MASK_PX = 2**28  # of the page that is read: 268 MB
ASPECT = 0.02  # how far the mask's width to height may be from the slide's; rounding of small masks stays below
FINER = 4  # outlines are drawn so much finer: Pillow paints every px that an edge touches
DRAWN_PX = 4096  # longer edge of what is drawn, as far as it is larger than the mask: 17 MB
FARTHEST = 2**28  # of a coordinate, level-0 px: Pillow draws with 32-bit integers, and no slide is so large
IGNORED = "*"  # QuPath's classes whose name ends so ("Ignore*") stand for nothing


@dataclass(frozen=True)
class ExternalMask:
    """The mask of one slide, not yet brought to a resolution."""

    uri: str
    data: bytes

    @property
    def digest(self) -> str:
        """sha256 (hex) of the file."""
        return hashlib.sha256(self.data).hexdigest()

    def at(self, width: int, height: int, dimensions: tuple[int, int], bounds: Box | None = None) -> Mask:
        """(height, width): px of which at least half is tissue.

        Args:
            width: of the mask that is wanted.
            height: of the mask that is wanted.
            dimensions: width and height of the slide, level-0 px.
            bounds: where on the slide the scan lies; None: everywhere.

        Raises:
            SlideError: "mask", the file is not what it should be, or does not fit the slide.
        """
        if self.uri.lower().endswith((".geojson", ".json")):
            corner = (0, 0) if bounds is None else bounds[:2]
            return _from_geojson(self.uri, self.data, (width, height), dimensions, corner)
        places = [Box(0, 0, *dimensions), *([] if bounds is None else [bounds])]
        return _from_image(self.uri, self.data, (width, height), places)


def read_mask(uri: str) -> ExternalMask:
    """Read the mask file; its content is looked at when it is used.

    Raises:
        StorageError: it cannot be read.
    """
    return ExternalMask(uri, files.read_bytes(uri))


def _bad(uri: str, message: str) -> SlideError:
    return SlideError("mask", f"{uri}: {message}")


def _from_image(uri: str, data: bytes, size: tuple[int, int], places: Sequence[Box]) -> Mask:
    """`places` are what the image may show, the whole slide first."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            page = _best_page(image, max(size))
            image.seek(page)
            _check_px(uri, image.size)
            turn = orientation(image)
            place = _place(uri, upright_size(image.size, turn), places)
            tissue = upright(_above_0(image), turn)
    except UnidentifiedImageError as error:
        raise _bad(uri, f"not a mask; give {' or '.join(FORMATS)} with tissue above 0, or GeoJSON") from error
    except (OSError, SyntaxError, EOFError, ValueError) as error:  # Pillow: the latter for broken PNGs and TIFFs
        raise _bad(uri, f"the mask cannot be decoded ({error}); write it again") from error
    return _laid(tissue, size) if place == places[0] else _laid_out(tissue, size, places[0], place)


def _above_0(image: Image.Image) -> Mask:
    """Where an image has any colour but black, and is not all transparent; of a palette its colours count."""
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        return np.asarray(rgba[..., :3].any(axis=2) & (rgba[..., 3] > 0))
    found = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    return np.asarray(found.any(axis=2) if found.ndim == 3 else found > 0)


def _laid(tissue: Mask, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Mask:
    """A mask, or a box in its px of it, brought to a width and height: px of which at least half is tissue."""
    share = Image.fromarray(tissue.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX, box)
    return np.asarray(share) >= 128


def _laid_out(tissue: Mask, size: tuple[int, int], whole: Box, place: Box) -> Mask:
    """The mask of a place as one of a width and height for the whole slide; there is no tissue around it."""
    scale = np.array(size) / whole[2:]
    start, end = np.array(place[:2]) * scale, (np.array(place[:2]) + place[2:]) * scale
    first, last = np.floor(start).astype(int), np.minimum(np.ceil(end).astype(int), size)  # px that it touches
    step = tissue.shape[::-1] / (end - start)  # mask px along one of those
    rim = math.ceil(step.max())  # the outer px reach over its edge, by less than one of them
    (left, top), (right, bottom) = (first - start) * step + rim, (last - start) * step + rim
    inner = _laid(np.pad(tissue, rim), tuple(last - first), (left, top, right, bottom))
    found = np.zeros(size[::-1], np.bool_)
    found[first[1] : last[1], first[0] : last[0]] = inner
    return found


def _best_page(image: Image.Image, edge: int) -> int:
    """The smallest page of a pyramid that is at least as large as what is wanted; else the largest one."""
    sizes = [max(page.size) for page in ImageSequence.Iterator(image)]
    large_enough = [number for number, size in enumerate(sizes) if size >= edge]
    return min(large_enough or range(len(sizes)), key=lambda number: sizes[number] if large_enough else -sizes[number])


def _check_px(uri: str, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_MASK_PX:
        raise _bad(uri, f"{size[0]} x {size[1]} px are over {MAX_MASK_PX}; give the mask at a lower resolution")


def _place(uri: str, size: tuple[int, int], places: Sequence[Box]) -> Box:
    """The first place that has the mask's shape."""
    slack = 1 / min(size) + ASPECT  # half a px at both ends
    for place in places:
        if abs(size[0] / size[1] / (place.width / place.height) - 1) <= slack:
            return place
    whole = places[0]
    raise _bad(
        uri,
        f"the mask is {size[0]} x {size[1]} px and the slide {whole.width} x {whole.height}: not one shape; "
        "the mask must show the whole slide, or all of its bounds, neither turned nor cropped",
    )


def _from_geojson(
    uri: str, data: bytes, size: tuple[int, int], dimensions: tuple[int, int], corner: tuple[int, int]
) -> Mask:
    try:
        polygons = [[_ring(points) + corner for points in rings] for rings in _polygons(json.loads(data))]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _bad(uri, f"not GeoJSON ({type(error).__name__}: {error}); export the annotations again") from error
    if not polygons:
        raise _bad(uri, "no Polygon or MultiPolygon in it; draw the tissue as areas, or leave the mask out")
    finer = max(1, min(FINER, DRAWN_PX // max(size)))
    canvas = Image.new("L", (size[0] * finer, size[1] * finer))
    scale = np.array(canvas.size) / dimensions
    for rings in polygons:
        _draw(canvas, [ring * scale for ring in rings])
    return np.asarray(canvas.resize(size, Image.Resampling.BOX)) >= 128


def _ring(points: Sequence[Sequence[float]]) -> Ring:
    ring = np.asarray(points, np.float64)[:, :2]
    if len(ring) < 3 or not (np.abs(ring) <= FARTHEST).all():
        raise ValueError(f"an outline of {len(ring)} points, all of which must be px; it needs 3")
    return ring


def _draw(canvas: Image.Image, rings: Sequence[Ring]) -> None:
    """Paint an outer ring and cut its holes, without touching what others painted in them."""
    corner = np.floor(np.min([ring.min(axis=0) for ring in rings], axis=0)).astype(int)
    corner = np.maximum(corner, 0)
    end = np.minimum(np.ceil(rings[0].max(axis=0)).astype(int) + 1, canvas.size)
    if (end <= corner).any():
        return  # outside of the slide
    piece = Image.new("L", (int(end[0] - corner[0]), int(end[1] - corner[1])))
    brush = ImageDraw.Draw(piece)
    for number, ring in enumerate(rings):
        # Pillow counts px from their centres
        brush.polygon([(float(x), float(y)) for x, y in ring - corner - 0.5], fill=0 if number else 255)
    canvas.paste(255, (int(corner[0]), int(corner[1])), piece)


def _polygons(node: Any) -> Iterator[list[Any]]:
    """The rings of every area in a GeoJSON document: outer one, then holes. What is null or empty has no area."""
    if node is None:
        return
    if isinstance(node, list):  # QuPath before 0.3 wrote a bare list of features
        for item in node:
            yield from _polygons(item)
        return
    kind = node["type"]
    if kind == "FeatureCollection":
        yield from _polygons(node["features"])
    elif kind == "Feature" and not _is_ignored(node.get("properties") or {}):
        yield from _polygons(node["geometry"])
    elif kind == "GeometryCollection":
        yield from _polygons(node["geometries"])
    elif kind in {"Polygon", "MultiPolygon"}:
        areas = node["coordinates"] if kind == "MultiPolygon" else [node["coordinates"]]
        yield from (rings for rings in areas if rings)


def _is_ignored(properties: Mapping[str, Any]) -> bool:
    return str((properties.get("classification") or {}).get("name", "")).endswith(IGNORED)
