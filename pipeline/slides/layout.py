"""What the levels of a tiled TIFF's slide hold, by its directories alone; which they are says `series`.

Covers Aperio SVS, Philips TIFF, OME-TIFF and generic pyramids whose tiles `tiles` decodes, with the same levels and
microns per px as OpenSlide finds (of an OME-TIFF OpenSlide finds level 0); of an OME-TIFF strips too.
Everything else is left to OpenSlide: what needs blending (Ventana, Leica), its own decoder (Hamamatsu, Aperio's
JPEG 2000 in YCbCr, palettes) or filling in (an Aperio slide with missing tiles takes them from the level above).
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import tifffile

from pipeline.errors import SlideError
from pipeline.formats.channels import Order, check_alone, check_samples, find_colours
from pipeline.slides.limits import check_pages
from pipeline.slides.reader import UPRIGHT, Level, Mpp, Picked, profile_name, stated_mpp
from pipeline.slides.series import Planes, Series, aperio_fields, description, is_beside, is_ome, pick_series
from pipeline.slides.tiles import TiledPage, joined, tiled_page
from pipeline.storage.ranges import ByteSource, Range, SourceFile

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it warns of, an error tells in our words

HEADER_BYTES = 64 * 2**10  # one read of a directory brings its small tags along
_ICC, _ORIENTATION = 34675, 274
PIXEL_BITS = 8
_NDPI_LENS, _NDPI_DEPTH = 65421, 65424
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
class Layout:
    """A tiled TIFF's levels, the largest first."""

    levels: tuple[Level, ...]
    pages: tuple[TiledPage, ...]
    mpp: Mpp | None
    """See `SlideReader.mpp`; of px as they are stored."""
    vendor: str
    picked: Picked
    profile: str | None
    """See `SlideReader.profile`."""
    orientation: int
    """How px are stored (`turned`)."""


@dataclass(frozen=True)
class Elsewhere:
    """The slide of a TIFF that another reader has to read, if it can be told to take the same image."""

    name: str
    """Of the file."""
    size: tuple[int, int]
    """Width and height of level 0."""
    tiled: bool
    directory: int | None
    """Its number in the file; None below another one."""
    leads: bool
    """It is the first of its size: who takes one of this size, unless told otherwise, takes this one."""
    picked: Picked

    def refusal(self) -> SlideError:
        """What to say when the reader takes another image."""
        page = "" if self.directory is None else f"[page={self.directory}]"
        return SlideError(
            "series",
            f"{self.name}: its slide is series {self.picked.series} of {self.size[0]} x {self.size[1]} px, whose kind "
            "of pixels OpenSlide or Pillow has to read, which take another image of the file; write this one to a "
            f"file of its own, as by `vips copy 'IN{page}' 'OUT.tiff[tile,pyramid,compression=jpeg]'`",
        )


def read_layout(source: ByteSource, series: int | None = None) -> Layout | Elsewhere | None:
    """The layout of a slide.

    Args:
        source: its file.
        series: number of the file's image to take; None: the one that is the slide.

    Returns:
        `Elsewhere` where its tiles are not for us; None where OpenSlide knows the format better, or where the file is
        no sound TIFF at all.

    Raises:
        SlideError: "truncated", the file was cut off; "unreadable", one of several directories is damaged, or they lead
            round; "pixel-type", over 8 bits a channel, or channels that are no colours; "orientation", it is stored
            turned, and who has to read it does not turn it; "series", nobody can tell which image is the slide;
            "too-large", it declares more than a slide has; or the file cannot be reached.
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
            tiff.pages.cache = True  # each directory is read once
            _check_whole(source, tiff)
            with _damage_told(source.name, tiff):
                check_pages(source.name, tiff)
            return _read(source, tiff, series)
    except (*BROKEN, ElementTree.ParseError):  # OpenSlide says what is wrong with it
        return None


def _read(source: ByteSource, tiff: tifffile.TiffFile, series: int | None) -> Layout | Elsewhere | None:
    first = tiff.pages.first
    if tiff.is_ndpi or first.is_bif or first.is_scn or _is_trestle(first):
        _check_for_library(source, first)
        return _ndpi_stack(tiff) if tiff.is_ndpi and series is None else None
    if first.is_tiled and first.software.startswith("Philips") and "<DataObject" in description(first):
        found = None if series else _philips(source, tiff)
        if found is None:
            _check_for_library(source, first)
        return found
    with _damage_told(source.name, tiff):
        if not is_ome(first):
            check_alone(source.name, tiff)
        chosen, picked = pick_series(tiff, source.name, series)
        if is_ome(first) and not chosen.channels:  # its XML is damaged, or says nothing
            check_alone(source.name, tiff)
    try:
        found = _readable(source, tiff, chosen, picked)
    except BROKEN:  # who reads the same image instead says what is wrong with it
        found = None
    return found or _elsewhere(tiff, chosen, picked)


@contextmanager
def _damage_told(name: str, tiff: tifffile.TiffFile) -> Iterator[None]:
    """SlideError where one of several directories is damaged: other readers would take an image that is left."""
    try:
        yield
    except BROKEN as error:
        if len(tiff.pages) == 1:
            raise
        raise SlideError(
            "unreadable",
            f"{name}: one of its {len(tiff.pages)} directories is damaged, so that nobody can tell which image is the "
            "slide; copy it again",
        ) from error


def _readable(source: ByteSource, tiff: tifffile.TiffFile, chosen: Series, picked: Picked) -> Layout | None:
    """The layout of the chosen series; None where its pixels are not for us, but for OpenSlide or Pillow."""
    _check_depth(source, chosen.first)
    order = find_colours(source.name, chosen.levels[0], chosen.channels)
    found = _chosen(source, tiff, chosen, picked, order)
    if found is None and chosen.first.is_tiled:
        _check_for_library(source, chosen.first)
    return found


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


def _check_for_library(source: ByteSource, page: tifffile.TiffPage) -> None:
    """SlideError where OpenSlide would read px, and not as they are meant."""
    _check_depth(source, page)
    check_samples(source.name, page)
    stored = _orientation(page)
    if stored != UPRIGHT:  # OpenSlide would turn each tile in its place, or none
        raise SlideError(
            "orientation", f"{source.name}: it is stored turned (TIFF orientation {stored}); store it upright"
        )


def _chosen(
    source: ByteSource, tiff: tifffile.TiffFile, chosen: Series, picked: Picked, order: Order | None
) -> Layout | None:
    """The layout of the chosen series; None where its pixels are not for us."""
    first = tiff.pages.first
    ome = is_ome(first)
    if not chosen.first.is_tiled and not ome:
        return None
    pages = [level[0] for level in chosen.levels]
    read = [_in_colour(source, level, order) for level in chosen.levels]
    if description(first).startswith("Aperio"):
        if any(page is not None and not page.lengths.all() for page in read):
            if _is_for_openslide(tiff, chosen):
                return None
            pages, read = pages[:1], read[:1]  # what is missing there it has from nowhere
        stated = next((value for page in pages if (value := aperio_fields(page).get("MPP"))), None)
        mpp = None if stated is None else (float(stated), float(stated))
        return _layout(pages, read, mpp, "aperio", picked)
    x, y = (length and length.microns for length in chosen.microns)
    mpp = (x, y) if x and y else _resolution(chosen.first)
    return _layout(pages, read, mpp, "ome-tiff" if ome else "generic-tiff", picked)


def _in_colour(source: ByteSource, level: Planes, order: Order | None) -> TiledPage | None:
    """A level's tiles, by what `find_colours` says of its directories, or of the samples of its only one."""
    if order is None or len(level) == 1:
        return tiled_page(source, level[0], order)
    return joined([tiled_page(source, level[number]) for number in order])


def _is_for_openslide(tiff: tifffile.TiffFile, chosen: Series) -> bool:
    """Whether the levels are all that is tiled in an Aperio slide, in their order.

    For tiles that are missing OpenSlide looks in the directory before, whatever that is, and ends the process (division
    by zero) where that is smaller.
    """
    tiled = [page.offset for page in tiff.pages if page.is_tiled]
    return tiled == [level[0].offset for level in chosen.levels]


def _elsewhere(tiff: tifffile.TiffFile, chosen: Series, picked: Picked) -> Elsewhere:
    first = chosen.first
    like = [page.index for page in tiff.pages if (page.imagewidth, page.imagelength) == chosen.size]
    directory = None if first.is_subifd else first.index
    leads = directory is not None and directory == like[0]
    if description(tiff.pages.first).startswith("Aperio") and not _is_for_openslide(tiff, chosen):
        leads = leads and all(0 not in page.databytecounts for page in tiff.pages)
    return Elsewhere(str(tiff.filename), chosen.size, first.is_tiled, directory, leads, picked)


def _ndpi_stack(tiff: tifffile.TiffFile) -> Elsewhere | None:
    """What OpenSlide takes of a Hamamatsu file of several focal planes: the nominal focus. None where there is one."""
    scans = [page for page in tiff.pages if page.tags.valueof(_NDPI_LENS, 0) > 0]  # else the glass
    depths = sorted({page.tags.valueof(_NDPI_DEPTH, 0) for page in scans})  # nanometres from the nominal focus
    focused = [page for page in scans if page.tags.valueof(_NDPI_DEPTH, 0) == 0]
    if len(depths) < 2 or not focused:
        return None
    largest = max(focused, key=lambda page: page.imagewidth)
    plane = f"focal plane {depths.index(0) + 1} of {len(depths)}"
    picked = Picked(largest.index, "", len(depths) + len(tiff.pages) - len(scans), plane, named=False)
    size = largest.imagewidth, largest.imagelength
    return Elsewhere(str(tiff.filename), size, tiled=True, directory=largest.index, leads=True, picked=picked)


def _philips(source: ByteSource, tiff: tifffile.TiffFile) -> Layout | None:
    """Levels are padded to whole tiles; the pixel spacings tell how large they really are."""
    tops = [page for page in tiff.pages if isinstance(page, tifffile.TiffPage)]
    pages = [page for page in tops if page.is_tiled and not is_beside(page)]
    pages.sort(key=lambda page: -page.imagewidth)
    scanned = [
        image
        for image in ElementTree.fromstring(description(tops[0])).findall(
            "Attribute[@Name='PIM_DP_SCANNED_IMAGES']/Array/DataObject"
        )
        if any(node.get("Name") == "PIM_DP_IMAGE_TYPE" and node.text == "WSI" for node in image.findall("Attribute"))
    ]
    spacings = scanned[0].findall(
        "Attribute[@Name='PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE']/Array"
        "/DataObject[@ObjectType='PixelDataRepresentation']/Attribute[@Name='DICOM_PIXEL_SPACING']"
    )
    found = sorted(_spacing(node.text) for node in spacings)
    if len(scanned) != 1 or len(found) != len(pages):
        return None
    width, height = pages[0].imagewidth, pages[0].imagelength
    factors = [round((x / found[0][0] + y / found[0][1]) / 2) for x, y in found]
    levels = [Level(width // factor, height // factor, float(factor)) for factor in factors]
    own = scanned[0].find("Attribute[@Name='DICOM_PIXEL_SPACING']")
    x, y = (0.0, 0.0) if own is None else _spacing(own.text)
    mpp = stated_mpp(1e3 * x, 1e3 * y)
    picked = Picked(0, "", 1 + len(tops) - len(pages), None, named=False)
    return _layout(pages, [tiled_page(source, page) for page in pages], mpp, "philips", picked, levels)


def _spacing(text: str | None) -> tuple[float, float]:
    """Millimetres per px along x and y; DICOM names rows first."""
    y, x = (float(word.strip('"')) for word in (text or "").split())
    return x, y


def _layout(
    pages: Sequence[tifffile.TiffPage],
    tiled: Sequence[TiledPage | None],
    mpp: Mpp | None,
    vendor: str,
    picked: Picked,
    levels: Sequence[Level] | None = None,
) -> Layout | None:
    """None unless all levels can be read and each is smaller than the one before."""
    width, height = pages[0].imagewidth, pages[0].imagelength
    sizes = [(page.imagewidth, page.imagelength) for page in pages]
    levels = levels or [Level(w, h, (width / w + height / h) / 2) for w, h in sizes]
    known = [page for page in tiled if page is not None]
    falling = all(a.downsample < b.downsample for a, b in pairwise(levels))
    if not falling or len(known) != len(pages):
        return None
    profile, orientation = profile_name(pages[0].tags.valueof(_ICC)), _orientation(pages[0])
    return Layout(tuple(levels), tuple(known), mpp and stated_mpp(*mpp), vendor, picked, profile, orientation)


def _orientation(page: tifffile.TiffPage) -> int:
    stated = page.tags.valueof(_ORIENTATION, UPRIGHT)
    return stated if stated in range(1, 9) else UPRIGHT


def _resolution(page: tifffile.TiffPage) -> Mpp | None:
    """Microns per px from the resolution tags: px per inch (the default) or cm."""
    unit = {2: 25_400.0, 3: 10_000.0}.get(int(page.tags.valueof(296, 2)))
    tags = [page.tags.valueof(code) for code in (282, 283)]
    if unit is None or None in tags:
        return None
    x, y = (numerator / denominator if denominator else 0.0 for numerator, denominator in tags)
    return (unit / x, unit / y) if x > 0 and y > 0 else None


def _is_trestle(page: tifffile.TiffPage) -> bool:
    return bool(page.software.startswith("MedScan"))
