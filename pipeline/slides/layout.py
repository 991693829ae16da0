"""Which pages of a tiled TIFF are a slide's levels, and what they hold, by its directories alone.

Covers Aperio SVS, Philips TIFF, OME-TIFF and generic pyramids whose levels are 8-bit RGB or YCbCr in tiles of JPEG
or JPEG 2000, with the same levels and microns per px as OpenSlide finds (of an OME-TIFF OpenSlide finds level 0).
Everything else is left to OpenSlide: what needs blending (Ventana, Leica), its own decoder (Hamamatsu, Aperio's
JPEG 2000 in YCbCr) or filling in (an Aperio slide with missing tiles takes them from the level above).
"""

from __future__ import annotations

import io
import logging
import math
import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import tifffile

from pipeline.errors import SlideError
from pipeline.slides import jpeg
from pipeline.slides.reader import Level, NativeTiles
from pipeline.storage.ranges import ByteSource, Range, SourceFile

Table = npt.NDArray[np.uint64]

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it warns of, an error tells in our words

HEADER_BYTES = 64 * 2**10  # one read of a directory brings its small tags along
_JPEG, _JPEG2000 = 7, (33005, 34712)
_RGB, _YCBCR = 2, 6
PIXEL_BITS = 8
SHAPE = 0.02  # how far the width to height of a level may be from the slide's
_REDUCED = 1  # bit of NewSubfileType
_TABLE_TYPES = {3: "u2", 4: "u4", 16: "u8"}  # SHORT, LONG, LONG8
_MICRONS = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
BROKEN = (
    tifffile.TiffFileError,
    struct.error,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
)  # what tifffile raises, or we of what it found: values of any type, or none


@dataclass(frozen=True)
class TiledPage:
    """The tiles of one level."""

    tiles: NativeTiles
    offsets: Table
    """(columns * rows,) row by row."""
    lengths: Table
    """Zero where the slide declares that it holds no data."""
    rgb: bool
    """The JPEG's components are RGB, not YCbCr."""
    tables: bytes
    """Shared JPEG tables, as segments."""


@dataclass(frozen=True)
class Layout:
    """A tiled TIFF's levels, the largest first."""

    levels: tuple[Level, ...]
    pages: tuple[TiledPage, ...]
    mpp: tuple[float, float] | None
    """Stated microns per level-0 px along x and y, unchecked."""
    vendor: str


def read_layout(source: ByteSource) -> Layout | None:
    """The layout of a slide; None where its tiles are not for us, or where it is no sound TIFF at all.

    Raises:
        SlideError: "truncated", the file was cut off; "pixel-type", over 8 bits a channel; or it cannot be reached.
    """
    (head,) = source.read([(0, 16)])
    if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    if len(head) == 16:
        _check_reach(source, head[8:] if b"+" in head[:4] else head[4:8], "<" if head[:1] == b"I" else ">")

    def read(wanted: Range) -> bytes:
        return source.read([wanted])[0]

    file = io.BufferedReader(SourceFile(source.size, read), buffer_size=HEADER_BYTES)
    try:
        with tifffile.TiffFile(file, name=source.name) as tiff:
            first = tiff.pages.first
            _check_whole(source, tiff)
            _check_depth(source, first)
            if not first.is_tiled or tiff.is_ndpi or first.is_bif or first.is_scn or _is_trestle(first):
                return None
            if str(first.description).startswith("Aperio"):
                return _aperio(source, tiff)
            if first.software.startswith("Philips") and "<DataObject" in first.description:
                return _philips(source, tiff)
            return _ome(source, tiff) if first.is_ome else _generic(source, tiff)
    except (*BROKEN, ElementTree.ParseError):  # OpenSlide says what is wrong with it
        return None


def _check_whole(source: ByteSource, tiff: tifffile.TiffFile) -> None:
    """SlideError when a directory should follow behind the end of the file: OpenSlide would just leave it out."""
    len(tiff.pages)  # follows the chain of directories
    (link,) = source.read([(tiff.pages.next_page_offset, tiff.tiff.offsetsize)])
    _check_reach(source, link, tiff.byteorder)


def _check_depth(source: ByteSource, page: tifffile.TiffPage) -> None:
    """SlideError when px have more bits than ours: other readers just keep the upper 8, and 12 of 16 come out black."""
    bits = int(np.max(page.bitspersample))
    if bits > PIXEL_BITS:
        raise SlideError(
            "pixel-type",
            f"{source.name}: {bits} bits a channel; convert it to {PIXEL_BITS}, scaled to the range of its values",
        )


def _check_reach(source: ByteSource, link: bytes, byteorder: str) -> None:
    """SlideError when the link to a directory leads behind the end of the file."""
    place = int.from_bytes(link, "little" if byteorder == "<" else "big")
    if place >= source.size:
        raise SlideError(
            "truncated", f"{source.name}: it ends before byte {place}, where more should be; copy the slide again"
        )


def _aperio(source: ByteSource, tiff: tifffile.TiffFile) -> Layout | None:
    pages = [page for page in tiff.pages if page.is_tiled]
    read = [_tiled_page(source, page) for page in pages]
    if any(page is None or not page.lengths.all() for page in read):
        return None
    fields = dict(part.split("=", 1) for part in pages[0].description.split("|")[1:] if "=" in part)
    stated = {key.strip(): value.strip() for key, value in fields.items()}.get("MPP")
    return _layout(pages, read, None if stated is None else (float(stated), float(stated)), "aperio")


def _generic(source: ByteSource, tiff: tifffile.TiffFile) -> Layout | None:
    reduced = [page for page in tiff.pages if page.is_tiled and page.index and int(page.subfiletype) & _REDUCED]
    pages = [tiff.pages.first, *(page for page in reduced if _has_shape_of(page, tiff.pages.first))]
    pages.sort(key=lambda page: -page.imagewidth)
    return _layout(pages, [_tiled_page(source, page) for page in pages], _resolution(tiff.pages.first), "generic-tiff")


def _has_shape_of(page: tifffile.TiffPage, first: tifffile.TiffPage) -> bool:
    """Whether a page may be the whole slide in small; a label or a picture of the glass may be tiled and small too."""
    width, height = page.imagewidth, page.imagelength
    ratio = width * first.imagelength / (height * first.imagewidth)
    return bool(abs(ratio - 1) <= SHAPE + 1 / min(width, height))  # a px, as each halving rounds


def _ome(source: ByteSource, tiff: tifffile.TiffFile) -> Layout | None:
    first = tiff.pages.first
    pages = [first, *(page for page in first.pages or () if page.is_tiled)]
    pixels = ElementTree.fromstring(first.description).find(".//{*}Image/{*}Pixels")
    stated = [] if pixels is None else [_physical(pixels, axis) for axis in "XY"]
    mpp = (stated[0], stated[1]) if stated and stated[0] and stated[1] else _resolution(first)
    return _layout(pages, [_tiled_page(source, page) for page in pages], mpp, "ome-tiff")


def _physical(pixels: ElementTree.Element, axis: str) -> float:
    """Microns per px of an OME Pixels element; 0 where it names none."""
    size = float(pixels.get(f"PhysicalSize{axis}", 0))
    return size * _MICRONS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"), 0.0)


def _philips(source: ByteSource, tiff: tifffile.TiffFile) -> Layout | None:
    """Levels are padded to whole tiles; the pixel spacings tell how large they really are."""
    pages = [page for page in tiff.pages if page.is_tiled]
    scanned = [
        image
        for image in ElementTree.fromstring(pages[0].description).findall(
            "Attribute[@Name='PIM_DP_SCANNED_IMAGES']/Array/DataObject"
        )
        if any(node.get("Name") == "PIM_DP_IMAGE_TYPE" and node.text == "WSI" for node in image.findall("Attribute"))
    ]
    spacings = scanned[0].findall(
        "Attribute[@Name='PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE']/Array"
        "/DataObject[@ObjectType='PixelDataRepresentation']/Attribute[@Name='DICOM_PIXEL_SPACING']"
    )
    found = [_spacing(node.text) for node in spacings]
    if len(scanned) != 1 or len(found) != len(pages):
        return None
    width, height = pages[0].imagewidth, pages[0].imagelength
    factors = [round((x / found[0][0] + y / found[0][1]) / 2) for x, y in found]
    levels = [Level(width // factor, height // factor, float(factor)) for factor in factors]
    own = scanned[0].find("Attribute[@Name='DICOM_PIXEL_SPACING']")
    x, y = (0.0, 0.0) if own is None else _spacing(own.text)
    return _layout(
        pages, [_tiled_page(source, page) for page in pages], (1e3 * x, 1e3 * y) if x and y else None, "philips", levels
    )


def _spacing(text: str | None) -> tuple[float, float]:
    """Millimetres per px along x and y; DICOM names rows first."""
    y, x = (float(word.strip('"')) for word in (text or "").split())
    return x, y


def _layout(
    pages: Sequence[tifffile.TiffPage],
    tiled: Sequence[TiledPage | None],
    mpp: tuple[float, float] | None,
    vendor: str,
    levels: Sequence[Level] | None = None,
) -> Layout | None:
    """None unless all levels can be read and each is smaller than the one before."""
    width, height = pages[0].imagewidth, pages[0].imagelength
    sizes = [(page.imagewidth, page.imagelength) for page in pages]
    levels = levels or [Level(w, h, (width / w + height / h) / 2) for w, h in sizes]
    known = [page for page in tiled if page is not None]
    falling = all(a.downsample < b.downsample for a, b in pairwise(levels))
    return Layout(tuple(levels), tuple(known), mpp, vendor) if falling and len(known) == len(pages) else None


def _tiled_page(source: ByteSource, page: tifffile.TiffPage) -> TiledPage | None:
    """One level's tiles; None where they are not 8-bit RGB or YCbCr of a codec that we decode."""
    compression, photometric = int(page.compression), int(page.photometric)
    codec: Literal["jpeg", "jpeg2000"] = "jpeg" if compression == _JPEG else "jpeg2000"
    if codec == "jpeg2000" and (compression not in _JPEG2000 or photometric != _RGB):
        return None
    pixel = (page.samplesperpixel, page.bitspersample, int(page.planarconfig), page.imagedepth, photometric)
    if pixel not in ((3, 8, 1, 1, _RGB), (3, 8, 1, 1, _YCBCR)):
        return None
    edges = (page.imagewidth, page.imagelength, page.tilewidth, page.tilelength)
    width, height, tile_width, tile_height = map(operator.index, edges)  # TypeError: damaged, a tag of another type
    columns, rows = -(-width // tile_width), -(-height // tile_height)
    tables = [_table(source, page, code) for code in (324, 325)]
    if any(len(table) != columns * rows for table in tables):
        return None
    tiles = NativeTiles(tile_width, tile_height, columns, rows, codec)
    return TiledPage(tiles, tables[0], tables[1], photometric == _RGB, jpeg.tables_segments(page.jpegtables))


def _table(source: ByteSource, page: tifffile.TiffPage, code: int) -> Table:
    """A tag of offsets or lengths, as an array from the start: as Python numbers it would take 5 times the memory."""
    tag = page.tags[code]
    kind = np.dtype(page.parent.byteorder + _TABLE_TYPES[int(tag.dtype)])
    if tag.count * kind.itemsize <= page.parent.tiff.tagoffsetthreshold:  # stands in the directory itself
        return np.atleast_1d(np.array(tag.value, np.uint64))
    (data,) = source.read([(tag.valueoffset, tag.count * kind.itemsize)])
    return np.frombuffer(data, kind).astype(np.uint64)


def _resolution(page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Microns per px from the resolution tags: px per inch (the default) or cm."""
    unit = {2: 25_400.0, 3: 10_000.0}.get(int(page.tags.valueof(296, 2)))
    tags = [page.tags.valueof(code) for code in (282, 283)]
    if unit is None or None in tags:
        return None
    x, y = (numerator / denominator if denominator else 0.0 for numerator, denominator in tags)
    return (unit / x, unit / y) if x > 0 and y > 0 else None


def mean_mpp(x: float, y: float) -> float | None:
    """Geometric mean of the stated x and y (they differ by rounding on real scanners), or None."""
    return math.sqrt(x * y) if x > 0 and y > 0 and math.isfinite(x * y) else None


def _is_trestle(page: tifffile.TiffPage) -> bool:
    return bool(page.software.startswith("MedScan"))
