"""Large slides with real pixels, for benchmarks: two H&E files pasted into a canvas, and the canvas repeated.

Nothing of it is stored: the two files lie beside the repo (see tests/conftest.py), the slides in a scratch folder.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import tifffile

from pipeline.slides.open import open_slide
from tests.conftest import SHARED_DATA

EDGE = 12_288  # px: 48 tiles of 256, so that four levels end at whole tiles
TILE = 256
LEVELS = 5
QUALITY = 70  # Aperio's default
_MARGIN, _GLASS = 512, 244
_FILES = ("CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs")


def write_canvas(path: Path) -> Path:
    """A tiled JPEG pyramid (YCbCr 4:2:0, shared tables, 0.5 microns per px) full of H&E, with a white margin."""
    import pyvips

    pictures = []
    for name in _FILES:
        with open_slide(SHARED_DATA / "slides" / name) as reader:
            pictures.append(pyvips.Image.new_from_array(reader.read(0, 0, 0, *reader.dimensions)))
    canvas = (pyvips.Image.black(EDGE, EDGE, bands=3) + _GLASS).cast("uchar")
    y = _MARGIN
    for row in range(4):
        x, picture = _MARGIN + 31 * row, pictures[row % 2]
        while x < EDGE - _MARGIN:
            width, height = min(picture.width, EDGE - _MARGIN - x), min(picture.height, EDGE - _MARGIN - y)
            if height <= 0:
                break
            canvas = canvas.insert(picture.crop(0, 0, width, height), x, y)
            x += picture.width
            picture = pictures[(pictures.index(picture) + 1) % 2]
        y += 2967 - 7 * row
    scaled = canvas.copy(xres=2000, yres=2000)  # px per mm
    scaled.tiffsave(
        str(path), tile=True, tile_width=TILE, tile_height=TILE, pyramid=True, compression="jpeg", Q=QUALITY
    )
    return path


def repeat(canvas: Path, path: Path, columns: int, rows: int, salt: int = 0) -> Path:
    """The canvas `columns` x `rows` times as one BigTIFF whose directories name each tile many times.

    `salt` makes slides of one size differ in content.
    """
    with tifffile.TiffFile(canvas) as tiff:
        pages = [page for page in tiff.pages if isinstance(page, tifffile.TiffPage)][:LEVELS]
        levels = [(np.array(p.dataoffsets), np.array(p.databytecounts), bytes(p.jpegtables or b"")) for p in pages]
    data = canvas.read_bytes()
    shift = 16
    with path.open("wb") as file:
        link = shift + len(data) + (-len(data)) % 16 + 16
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, link) + data)
        file.write(bytes(link - file.tell() - 8) + struct.pack("<Q", salt))
        for number, (offsets, lengths, tables) in enumerate(levels):
            edge = EDGE >> number
            tiles = [np.tile(table.reshape(edge // TILE, -1), (rows, columns)).ravel() for table in (offsets, lengths)]
            last = number == len(levels) - 1
            file.write(
                _directory(file.tell(), edge * columns, edge * rows, tiles[0] + shift, tiles[1], tables, number, last)
            )
    return path


def _directory(
    at: int,
    width: int,
    height: int,
    offsets: np.ndarray,
    lengths: np.ndarray,
    tables: bytes,
    number: int,
    last: bool,  # noqa: FBT001
) -> bytes:
    """One BigTIFF directory that stands at byte `at`, its values behind it, and the next one behind those."""
    per_cm = struct.pack("<II", 20_000 >> number, 1)
    short, long, rational, undefined, long8 = 3, 4, 5, 7, 16
    tags = [
        (254, long, 1, struct.pack("<I", int(number > 0))),
        (256, long, 1, struct.pack("<I", width)),
        (257, long, 1, struct.pack("<I", height)),
        (258, short, 3, struct.pack("<3H", 8, 8, 8)),
        (259, short, 1, struct.pack("<H", 7)),
        (262, short, 1, struct.pack("<H", 6)),
        (277, short, 1, struct.pack("<H", 3)),
        (282, rational, 1, per_cm),
        (283, rational, 1, per_cm),
        (284, short, 1, struct.pack("<H", 1)),
        (296, short, 1, struct.pack("<H", 3)),
        (322, long, 1, struct.pack("<I", TILE)),
        (323, long, 1, struct.pack("<I", TILE)),
        (324, long8, len(offsets), offsets.astype("<u8").tobytes()),
        (325, long, len(lengths), lengths.astype("<u4").tobytes()),
        (347, undefined, len(tables), tables),
        (530, short, 2, struct.pack("<2H", 2, 2)),
    ]
    entries, values = b"", b""
    behind = at + 8 + 20 * len(tags) + 8
    for code, kind, count, packed in tags:
        field = packed.ljust(8, b"\0")
        if len(packed) > 8:
            values += bytes(-(behind + len(values)) % 8)
            field = struct.pack("<Q", behind + len(values))
            values += packed
        entries += struct.pack("<HHQ", code, kind, count) + field
    values += bytes(-(behind + len(values)) % 16)
    return struct.pack("<Q", len(tags)) + entries + struct.pack("<Q", 0 if last else behind + len(values)) + values
