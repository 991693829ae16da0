"""A pyramidal, tiled JPEG TIFF, as scanners write them (TIFF 6.0 with the JPEG scheme of Technical Note 2)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

TILE = 256
JPEG_QUALITY = 85
_SHORT, _LONG, _RATIONAL = 3, 4, 5
_FORMATS = {_SHORT: "H", _LONG: "I", _RATIONAL: "I"}


def write_pyramid(path: Path, rgbx: npt.NDArray[np.uint8], mpp: float) -> None:
    """Write (h, w, 4) RGBX; each level is half of the one before, down to at most two tiles a side.

    `mpp` is that of level 0 and stands in the resolution tags, in px per cm. Classic TIFF: below 4 GB.
    """
    with path.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, 0))
        link = 4  # where the offset of the next directory is to be written
        level, reduced = np.ascontiguousarray(rgbx), 0
        while True:
            link = _write_level(file, link, level, mpp * 2**reduced, reduced=bool(reduced))
            height, width = level.shape[:2]
            if max(height, width) <= 2 * TILE:
                return
            even = Image.fromarray(level, "RGBX").crop((0, 0, width // 2 * 2, height // 2 * 2))
            level, reduced = np.asarray(even.reduce(2)), reduced + 1


def _write_level(file: BinaryIO, link: int, level: npt.NDArray[np.uint8], mpp: float, *, reduced: bool) -> int:
    """Tiles, then their tables, then the directory; returns where the link to the next directory stands."""
    offsets, lengths = [], []
    for tile in _encoded_tiles(level):
        offsets.append(file.tell())
        lengths.append(len(tile))
        file.write(tile)
    height, width = level.shape[:2]
    per_cm = (round(1e9 / mpp), 100_000)  # 10,000 microns a cm
    entries = [
        (254, _LONG, (int(reduced),)),  # NewSubfileType: a reduced version of another page
        (256, _LONG, (width,)),
        (257, _LONG, (height,)),
        (258, _SHORT, (8, 8, 8)),
        (259, _SHORT, (7,)),  # JPEG
        (262, _SHORT, (6,)),  # YCbCr
        (277, _SHORT, (3,)),
        (282, _RATIONAL, per_cm),
        (283, _RATIONAL, per_cm),
        (284, _SHORT, (1,)),
        (296, _SHORT, (3,)),  # resolution in px per cm
        (322, _LONG, (TILE,)),
        (323, _LONG, (TILE,)),
        (324, _LONG, tuple(offsets)),
        (325, _LONG, tuple(lengths)),
        (530, _SHORT, (2, 2)),  # chroma at half resolution
    ]
    directory = struct.pack("<H", len(entries))
    for tag, kind, values in entries:
        packed = struct.pack(f"<{len(values)}{_FORMATS[kind]}", *values)
        count = len(values) // 2 if kind == _RATIONAL else len(values)
        if len(packed) > 4:
            file.write(b"\0" * (file.tell() % 2))
            packed, data = struct.pack("<I", file.tell()), packed
            file.write(data)
        directory += struct.pack("<HHI4s", tag, kind, count, packed)
    file.write(b"\0" * (file.tell() % 2))
    start = file.tell()
    file.write(directory + struct.pack("<I", 0))
    end = file.tell()
    file.seek(link)
    file.write(struct.pack("<I", start))
    file.seek(end)
    return end - 4


def _encoded_tiles(level: npt.NDArray[np.uint8]) -> Iterator[bytes]:
    """Every tile as a JPEG of its own, row by row; those at the edge are filled up with their last pixels."""
    height, width = level.shape[:2]
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            tile = level[top : top + TILE, left : left + TILE]
            missing = (TILE - tile.shape[0], TILE - tile.shape[1])
            if any(missing):
                tile = np.pad(tile, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
            yield simplejpeg.encode_jpeg(
                np.ascontiguousarray(tile), quality=JPEG_QUALITY, colorspace="RGBX", colorsubsampling="420"
            )
