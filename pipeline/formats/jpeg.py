"""JPEG at the level of its segments: the tiles of a TIFF made into files of their own, without decoding them.

A tile of a TIFF may lack its tables, which then stand once in the directory (TIFF Technical Note 2), and its colour
space is what the directory says where it does not name it. A file of its own needs the tables in it, and where decoders
would guess otherwise an Adobe segment (APP14) that names the colour space. The compressed data stay as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
ZERO_RUN = bytes(64)  # coded data never repeat one bit 512 times, unless a block of the file was lost

_APP0, _APP14, _SOS = 0xE0, 0xEE, 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..15, less DHT, JPG and DAC
_STRAY = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # in coded data 255 is followed by 0, or it is a restart marker
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # APP14: version 100, no flags, no transform
_SEQUENTIAL = (0xC0, 0xC1)  # one scan holds everything

Colours = Literal["RGB", "YCbCr"]


@dataclass(frozen=True)
class Header:
    """The segments before a JPEG's compressed data."""

    width: int
    height: int
    components: bytes
    """Their identifiers."""
    sequential: bool
    """Not progressive: the first end marker ends the image."""
    scan: int
    """Where the compressed data begin."""
    colours: Colours | None
    """What it says that they are, by JFIF's or Adobe's segment or its components' names; None where it does not."""


def header(data: bytes) -> Header:
    """Parse up to the first scan.

    Raises:
        ValueError: no JPEG, or cut short; says what is wrong.
    """
    if data[:2] != SOI:
        raise ValueError("it does not begin as a JPEG")
    at, frame = 2, None
    colours: Colours | None = None
    try:
        while True:
            if data[at] != 0xFF:
                raise ValueError(f"no marker at byte {at}")
            marker = data[at + 1]
            if marker == 0xFF:  # a fill byte
                at += 1
                continue
            end = at + 2 + (data[at + 2] << 8 | data[at + 3])
            if marker in _FRAMES:
                frame = (marker, data[at + 4 : end])
            elif marker == _APP0 and data[at + 4 : at + 8] == b"JFIF":
                colours = "YCbCr"
            elif marker == _APP14 and data[at + 4 : at + 9] == b"Adobe":
                colours = colours or ("YCbCr" if data[at + 15] else "RGB")  # libjpeg: JFIF's segment rules
            elif marker == _SOS:
                break
            at = end
    except IndexError:
        raise ValueError("it ends within its header") from None
    kind, sof = frame or (0, b"")
    if len(sof) < 6 or len(sof) < 6 + 3 * sof[5]:
        raise ValueError("it names no frame before its scan")
    components = sof[6::3][: sof[5]]
    height, width = sof[1] << 8 | sof[2], sof[3] << 8 | sof[4]
    colours = colours or ("RGB" if components == b"RGB" else None)
    return Header(width, height, components, kind in _SEQUENTIAL, end, colours)


def tables_segments(tables: bytes | None) -> bytes:
    """The segments of a TIFF directory's JPEGTables, without their start and end marker.

    Those that name a colour space (APP0, APP14) are left out: they are the tables', which are an image of their own.
    """
    data = tables or b""
    data = (data[2:] if data.startswith(SOI) else data).removesuffix(EOI)
    kept, at = [], 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if data[at + 1] not in (_APP0, _APP14):
            kept.append(data[at:end])
        at = end
    return b"".join(kept) + data[at:]  # what is no segment, the decoder will name


def standalone(tile: bytes, tables: bytes, rgb: bool, found: Header | None = None) -> bytes:  # noqa: FBT001
    """A TIFF's JPEG tile as a file of its own; the tile itself where it already is one.

    Where the tile says what its colours are, that holds: files exist whose directory says RGB of tiles that are JFIF,
    which is YCbCr. The directory is believed where the tile says nothing.

    Args:
        tile: as it stands in the file; what follows its end marker is left out.
        tables: from `tables_segments`.
        rgb: whether the directory says that the components are RGB and not YCbCr.
        found: the tile's header, where it has been parsed.

    Raises:
        ValueError: the tile is no JPEG.
    """
    head = found or header(tile)
    end = _end(tile, head) + 2
    more = _ADOBE_RGB + tables if rgb and head.colours is None else tables
    return b"".join((SOI, more, memoryview(tile)[2:end])) if more else tile[:end]


def is_doubtful(tile: bytes, found: Header) -> bool:
    """Whether compressed data look damaged: cut short, a marker within them, or a long run of zeros.

    Cheap (one pass at memory speed, nothing decoded) and so incomplete: flipped bits may look like other data.
    """
    end = _end(tile, found)
    if tile[end : end + 2] != EOI or not found.sequential:
        return True
    return _STRAY.search(tile, found.scan, end) is not None or tile.find(ZERO_RUN, found.scan, end) >= 0


def _end(tile: bytes, found: Header) -> int:
    """Where the end marker stands; behind the tile where there is none."""
    if tile.endswith(EOI):
        return len(tile) - 2
    end = tile.find(EOI, found.scan)
    return len(tile) if end < 0 else end
