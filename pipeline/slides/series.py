"""Which image of a TIFF is the slide, and which of its directories are the slide's levels.

A file's images are its series: each one picture in several sizes. An OME-TIFF's are the images of its XML, matched to
directories by where the XML says that they lie and by their size; another file's are the directories that are nobody's
level. Labels, pictures of the glass and thumbnails are told by name, by NewSubfileType, by shape and by size, never by
their order. The slide is the largest series; where another could as well be meant, nobody guesses.

Of a stack the middle focal plane is taken, as QuPath shows it, and the first time.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree

from tifffile import TiffFile, TiffPage

from pipeline.errors import SlideError
from pipeline.formats.ome import Channel, Length, Ome, OmeImage, Plane, parse_ome
from pipeline.slides.reader import Picked, has_shape_of

RIVAL = 0.3  # an image of this share of the largest one's px may be the slide; each halving leaves 0.25
RIVAL_OF_LIKE_MPP = 0.01  # the same where both state microns, and the smaller one's are as fine
LIKE_MPP = 1.5
LISTED = 20  # images that a message names
_REDUCED, _MASK, _MACRO = 1, 4, 8  # bits of NewSubfileType; the last is Aperio's
_BESIDE = r"(?:label|macro|thumbnail|overview|preview|barcode)(?:[ _](?:image|mask))*"
_NAME = re.compile(rf"(?:.*[\s:/#-])?{_BESIDE}[\s#]*\d*(?:\.\w+)?", re.IGNORECASE)
_LINE = re.compile(rf"{_BESIDE}(?: \d+ ?x ?\d+)?", re.IGNORECASE)  # of a description, as Aperio and Philips write it
_DECLARED = re.compile(r"\[\d+,\d+ (\d+)x(\d+)\]")  # of an Aperio description: the part of the glass that was scanned

Planes = tuple[TiffPage, ...]
"""The directories of one level: one for each channel, or one where all channels share it."""


@dataclass(frozen=True)
class Series:
    """One image of a file."""

    index: int
    """Of an OME-TIFF its place in the XML, of others the directory of its largest level."""
    name: str
    levels: tuple[Planes, ...]
    """The largest first."""
    reduced: bool
    """NewSubfileType says that it is a small copy of another image."""
    beside: bool
    """A label, a picture of the glass, a thumbnail, a mask: beside the slide."""
    microns: tuple[Length | None, Length | None] = (None, None)
    """Of a level-0 px along x and y, as the OME-XML states them."""
    plane: str | None = None
    """Which of several focal planes or times it is."""
    channels: tuple[Channel, ...] = ()
    """As the OME-XML names them, in the order of a level's directories, or of its samples."""

    @property
    def first(self) -> TiffPage:
        """The largest level's directory, of the first channel where each has one."""
        return self.levels[0][0]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the largest level."""
        return _size(self.first)

    @property
    def area(self) -> int:
        """Px of the largest level."""
        return math.prod(self.size)

    def __str__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"series {self.index}{name} of {self.size[0]} x {self.size[1]} px"


def pick_series(tiff: TiffFile, name: str, wanted: int | None) -> tuple[Series, Picked]:
    """The file's image that is the slide, and what to record of the choice.

    Args:
        tiff: the open file.
        name: of the file, for messages.
        wanted: index of the series that the cohort names.

    Raises:
        SlideError: "series", several could be the slide, or there is none of this index.
    """
    found = find_series(tiff)
    able = [one for one in found if not one.beside and not one.reduced] or found
    best = max(able, key=lambda one: one.area)
    rivals = [one for one in able if one is not best and _is_rival(one, best)]
    chosen = best if wanted is None else next((one for one in found if one.index == wanted), None)
    if chosen is None:
        raise SlideError(
            "series", f"{name}: there is no series {wanted}, which the cohort names; it holds {_listed(found)}"
        )
    if rivals and wanted is None:
        those = _listed([one for one in able if one is best or one in rivals])
        raise SlideError(
            "series",
            f"{name}: several images could be the slide: {those}; give the number of one in the cohort's series column "
            "(predict: --series)",
        )
    named = wanted is not None and (chosen is not best or bool(rivals))
    return chosen, Picked(chosen.index, chosen.name, len(found), chosen.plane, named)


def find_series(tiff: TiffFile) -> list[Series]:
    """All images of a file.

    Raises:
        ValueError: a directory is damaged; tifffile raises more kinds.
    """
    tops = [page for page in tiff.pages if isinstance(page, TiffPage)]
    if len(tops) < len(tiff.pages):
        raise ValueError("a directory is damaged")
    first = tops[0]
    if description(first).startswith("Aperio"):
        return _aperio(tops)
    if is_ome(first):
        try:
            return _ome(tops, parse_ome(description(first)))
        except (ElementTree.ParseError, ValueError):  # the directories still tell what they are
            pass
    return _joined([_plain(page) for page in tops])


def description(page: TiffPage) -> str:
    """ImageDescription, whatever it is encoded in: what is looked for in it is ASCII, or XML in UTF-8."""
    value = page.tags.valueof(270, "")  # bytes where it is neither UTF-8 nor cp1252
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def is_ome(page: TiffPage) -> bool:
    """Whether a file's first directory says that it is an OME-TIFF."""
    return description(page).rstrip("\0 \r\n").endswith("OME>")


def _size(page: TiffPage) -> tuple[int, int]:
    return page.imagewidth, page.imagelength


def _listed(series: Sequence[Series]) -> str:
    more = f" and {len(series) - LISTED} more" if len(series) > LISTED else ""
    return ", ".join(map(str, series[:LISTED])) + more


def _is_rival(one: Series, best: Series) -> bool:
    """Whether an image could as well be meant as the largest one."""
    mine, its = one.microns[0], best.microns[0]
    if mine is not None and its is not None and mine.unit == its.unit:
        return mine.value <= LIKE_MPP * its.value and one.area >= RIVAL_OF_LIKE_MPP * best.area
    return one.area >= RIVAL * best.area


def _with_subs(top: TiffPage) -> list[TiffPage]:
    if top.pages is None:
        return [top]
    top.pages.cache = True  # each directory is read once
    return [top, *(page for page in top.pages if isinstance(page, TiffPage))]


def _is_reduced(page: TiffPage) -> bool:
    return bool(int(page.subfiletype) & _REDUCED)


def is_beside(page: TiffPage) -> bool:
    """Whether a directory says of itself that it is a label, a picture of the glass, a thumbnail or a mask."""
    lines = description(page).splitlines()[:2]
    named = any(_LINE.fullmatch(line.strip()) for line in lines)
    return named or bool(int(page.subfiletype) & (_MASK | _MACRO))


def _pyramid(pages: Iterable[Planes]) -> tuple[Planes, ...]:
    """Levels, the largest first: what has another shape or layout than it is none, nor what has its size again."""
    ordered = sorted(pages, key=lambda planes: -math.prod(_size(planes[0])))
    first = ordered[0][0]
    levels: dict[tuple[int, int], Planes] = {}
    for planes in ordered:
        if planes[0].is_tiled == first.is_tiled and has_shape_of(_size(planes[0]), _size(first)):
            levels.setdefault(_size(planes[0]), planes)
    return tuple(levels.values())


def _plain(top: TiffPage) -> Series:
    """A directory with those below it as a series of its own."""
    pages = _with_subs(top)
    reduced = all(_is_reduced(page) for page in pages)
    return Series(top.index, "", _pyramid((page,) for page in pages), reduced, is_beside(top))


def _joined(series: Sequence[Series]) -> list[Series]:
    """Directories that are reduced images as levels of the one series whose shape they have."""
    apart = [one for one in series if not one.beside]
    if apart and all(one.reduced for one in apart):  # of what?
        largest = max(apart, key=lambda one: one.area)
        series = [replace(one, reduced=one.reduced and one is not largest) for one in series]
    whole = [one for one in series if not one.reduced and not one.beside]
    left, joined = [], {one.index: list(one.levels) for one in whole}
    for one in (one for one in series if one.reduced or one.beside):
        alike = [other for other in whole if has_shape_of(one.size, other.size)]
        owners = [other for other in alike if len(other.levels[0]) == len(one.levels[0])]
        area = max((other.area for other in owners), default=0)
        owners = [other for other in owners if other.area >= RIVAL * area]  # a thumbnail has no levels
        if one.reduced and not one.beside and len(owners) == 1:
            joined[owners[0].index] += one.levels
        else:
            left.append(one)
    grown = [replace(one, levels=_pyramid(joined[one.index])) for one in whole]
    return sorted([*grown, *left], key=lambda one: one.index)


def _aperio(tops: Sequence[TiffPage]) -> list[Series]:
    """What is tiled are the levels, of which none is marked; label, picture of the glass and thumbnail are in strips.

    Those may be tiled too in files that other programs wrote: the scan is what has the size that it declares of itself.
    """
    tiled = [page for page in tops if page.is_tiled]
    scans = [page for page in tiled if not is_beside(page)] or tiled or list(tops)
    groups: defaultdict[tuple[int, int], list[TiffPage]] = defaultdict(list)
    for page in scans:
        groups[_size(page)].append(page)
    declared = [_size(page) for page in scans if _declared_size(page) == _size(page)]
    size = max(declared or groups, key=math.prod)
    planes = groups[size]
    small = [page for page in scans if declared or has_shape_of(_size(page), size)]
    others = [replace(_plain(page), beside=page not in scans, reduced=page in small) for page in tops]
    depths = [_aperio_depth(page) for page in planes]
    if len(planes) == 1 or None in depths:
        return _joined([replace(one, reduced=one.reduced and one.first not in planes) for one in others])
    middle = len(planes) // 2
    stacks = [sorted(group, key=lambda page: _aperio_depth(page) or 0.0) for group in groups.values()]
    levels = _pyramid((stack[middle],) for stack in stacks if len(stack) == len(planes))
    stack = Series(planes[0].index, "", levels, reduced=False, beside=False, plane=_plane(middle, len(planes), 0, 1))
    return [stack, *(one for one in others if one.beside)]


def aperio_fields(page: TiffPage) -> Mapping[str, str]:
    """What an Aperio description states after its first line."""
    parts = (part.split("=", 1) for part in description(page).split("|")[1:] if "=" in part)
    return {key.strip(): value.strip() for key, value in parts}


def _declared_size(page: TiffPage) -> tuple[int, int] | None:
    """Width and height of the scan that an Aperio description says a directory is of."""
    found = _DECLARED.search(description(page))
    return None if found is None else (int(found[1]), int(found[2]))


def _aperio_depth(page: TiffPage) -> float | None:
    """Microns from the nominal focus, of a plane of a stack."""
    stated = aperio_fields(page).get("OffsetZ")
    return None if stated is None else float(stated)


def _ome(tops: Sequence[TiffPage], ome: Ome) -> list[Series]:
    """The images of the XML that are in the file, then the directories that it does not name."""
    free = dict(enumerate(tops))
    placed: dict[int, Mapping[int, Plane]] = {}
    for claims in (_where_it_says, _by_size, _though_of_another_size):
        for number, image in enumerate(ome.images):
            found = {} if number in placed else claims(image, ome.uuid, free)
            if found:
                placed[number] = found
                free = {ifd: page for ifd, page in free.items() if ifd not in found}
    named = [_ome_series(number, ome.images[number], tops, planes) for number, planes in sorted(placed.items())]
    rest = [replace(_plain(page), index=number) for number, page in enumerate(free.values(), len(ome.images))]
    return _joined([*named, *rest])


def _where_it_says(image: OmeImage, uuid: str | None, free: Mapping[int, TiffPage]) -> Mapping[int, Plane]:
    """Directory -> plane of an image, where the XML names directories and they have its size."""
    planes = image.planes(uuid, max(free, default=-1) + 1)
    return {ifd: plane for ifd, plane in planes.items() if ifd in free and _fits(free[ifd], image)}


def _by_size(image: OmeImage, uuid: str | None, free: Mapping[int, TiffPage]) -> Mapping[int, Plane]:
    """The same by size, where as many directories have it as the image has planes."""
    like = [ifd for ifd, page in free.items() if _fits(page, image)]
    alone = image.is_in(uuid) and len(like) == math.prod(image.counts.values())
    return dict(zip(like, image.in_order(), strict=True)) if alone else {}


def _though_of_another_size(image: OmeImage, uuid: str | None, free: Mapping[int, TiffPage]) -> Mapping[int, Plane]:
    """The same where the XML is wrong about the size: its name and its planes hold, its microns do not."""
    planes = {ifd: plane for ifd, plane in image.planes(uuid, max(free, default=-1) + 1).items() if ifd in free}
    return {ifd: plane for ifd, plane in planes.items() if _size(free[ifd]) == _size(free[min(planes)])}


def _fits(top: TiffPage, image: OmeImage) -> bool:
    size = image.sizes["X"], image.sizes["Y"]
    return _size(top) == size or size in map(_size, _with_subs(top))


def _ome_series(number: int, image: OmeImage, tops: Sequence[TiffPage], planes: Mapping[int, Plane]) -> Series:
    """An image of which these directories hold the planes."""
    time = min(plane.t for plane in planes.values())
    depths = sorted({plane.z for plane in planes.values() if plane.t == time})
    depth = depths[len(depths) // 2]
    channels = sorted((plane.c, ifd) for ifd, plane in planes.items() if (plane.z, plane.t) == (depth, time))
    stacks = [_with_subs(tops[ifd]) for _, ifd in channels]
    same = len({len(stack) for stack in stacks}) == 1
    levels = _pyramid(zip(*stacks, strict=True) if same else [tuple(stack[0] for stack in stacks)])
    first, counts = levels[0][0], image.counts
    return Series(
        index=number,
        name=image.name,
        levels=levels,
        reduced=all(_is_reduced(level[0]) for level in levels),
        beside=_NAME.fullmatch(image.name.strip()) is not None or is_beside(first),
        microns=_microns(image, first) if _fits(tops[channels[0][1]], image) else (None, None),
        plane=_plane(depth, counts["Z"], time, counts["T"]),
        channels=image.channels,
    )


def _microns(image: OmeImage, page: TiffPage) -> tuple[Length | None, Length | None]:
    """Of a px of a directory, which may be another level than the one that the XML describes."""
    factors = image.sizes["X"] / page.imagewidth, image.sizes["Y"] / page.imagelength
    x, y = (size and replace(size, value=size.value * by) for size, by in zip(image.physical, factors, strict=True))
    return x, y


def _plane(depth: int, depths: int, time: int, times: int) -> str | None:
    """In words, counted from one; None where there is no other."""
    words = [f"focal plane {depth + 1} of {depths}"] if depths > 1 else []
    words += [f"time {time + 1} of {times}"] if times > 1 else []
    return ", ".join(words) or None
