"""Generated slides: tiled JPEG pyramids that OpenSlide opens, with asymmetric tissue, and ways to spoil them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile
from PIL import Image

RGB = npt.NDArray[np.uint8]

GLASS = 244


def tissue_rgb(width: int, height: int, seed: int = 0) -> RGB:
    """White glass with noise, a large piece of tissue in the upper left and a small one in the lower right.

    No flip, turn or transposition maps the picture onto itself.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width], float)[:, None, None]
    wave = 0.03 * np.sin(19 * x + 3 * seed) + 0.02 * np.cos(23 * y)
    large = ((x - 0.35) / 0.28) ** 2 + ((y - 0.40) / 0.33) ** 2 < 1 + 4 * wave
    small = ((x - 0.82) / 0.10) ** 2 + ((y - 0.83) / 0.09) ** 2 < 1
    rgb = np.full((height, width, 3), GLASS, np.float64) + rng.normal(0, 1.5, (height, width, 1))
    texture = rng.normal(0, 14, (height, width, 1))
    rgb[large] = (np.array([200, 120, 170]) + 30 * np.stack([y, x, x * y], -1) + texture)[large]
    rgb[small] = (np.array([140, 80, 160]) + texture)[small]
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def write_pyramid(
    path: Path,
    rgb: RGB,
    *,
    tile: int = 240,
    levels: int = 3,
    mpp: float | None = 0.5,
    quality: int = 90,
    subsampling: str = "444",
    sparse: Container[int] = (),
    shared: bool = False,
    photometric: str = "ycbcr",
    description: str | None = None,
    software: str | None = None,
    more: Sequence[tuple[int, str, tuple[int, ...]]] = (),
) -> Path:
    """Write a generic tiled TIFF with JPEG tiles, each level half the one before.

    The level-0 tiles numbered in `sparse` have length zero: the file says that there is nothing. `shared`: the tables
    stand once in the directory, and the tiles name no colour space, as scanners write them. `more` are further tags:
    code, type (H, I, s, B) and values.
    """
    with path.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, 0))
        link = 4  # where the offset of the next directory is written
        for number in range(levels):
            spans = []
            tables = b""
            for i, jpeg in enumerate(_tiles(rgb, tile, quality, subsampling, photometric)):
                data, tables = split_tables(jpeg) if shared else (jpeg, b"")
                kept = b"" if number == 0 and i in sparse else data
                spans.append((file.tell() if kept else 0, len(kept)))
                file.write(kept)
            tags = _tags(rgb, tile, subsampling, mpp, spans, reduced=number > 0)
            tags += [(347, "B", tuple(tables))] if shared else []
            tags += [(270, "s", tuple(description.encode() + b"\0"))] if description and not number else []
            tags += [(305, "s", tuple(software.encode() + b"\0"))] if software else []
            tags += more
            if photometric == "rgb":
                tags = [tag if tag[0] != 262 else (262, "H", (2,)) for tag in tags if tag[0] != 530]
            link = _write_directory(file, link, sorted(tags))
            size = (max(1, rgb.shape[1] // 2), max(1, rgb.shape[0] // 2))
            rgb = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BOX))
    return path


def write_tiles(
    path: Path,
    rgb: RGB,
    tile: int,
    encode: Callable[[RGB], bytes],
    *,
    compression: int,
    photometric: int,
    mpp: float | None = None,
    description: bytes | None = None,
) -> Path:
    """Write a generic tiled TIFF of one level whose tiles are what `encode` gives, whatever the directory says."""
    with path.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, 0))
        spans = []
        for block in _blocks(rgb, tile):
            data = encode(block)
            spans.append((file.tell(), len(data)))
            file.write(data)
        replaced = {259: ("H", (compression,)), 262: ("H", (photometric,))}
        tags = [
            (code, *replaced.get(code, (kind, values)))
            for code, kind, values in _tags(rgb, tile, "444", mpp, spans, reduced=False)
            if code != 530 or photometric == 6
        ]
        tags += [(270, "s", tuple(description + b"\0"))] if description else []
        _write_directory(file, 4, sorted(tags))
    return path


def _tags(
    rgb: RGB, tile: int, subsampling: str, mpp: float | None, spans: list[tuple[int, int]], *, reduced: bool
) -> list[tuple[int, str, tuple[int, ...]]]:
    per_cm = (round(1e9 / mpp), 100_000) if mpp is not None else (0, 1)
    return [
        (254, "I", (int(reduced),)),
        (256, "I", (rgb.shape[1],)),
        (257, "I", (rgb.shape[0],)),
        (258, "H", (8, 8, 8)),
        (259, "H", (7,)),  # JPEG
        (262, "H", (6,)),  # YCbCr
        (277, "H", (3,)),
        (282, "II", per_cm),
        (283, "II", per_cm),
        (284, "H", (1,)),
        (296, "H", (3,)),
        (322, "I", (tile,)),
        (323, "I", (tile,)),
        (324, "I", tuple(offset for offset, _ in spans)),
        (325, "I", tuple(length for _, length in spans)),
        (530, "H", {"444": (1, 1), "422": (2, 1), "420": (2, 2)}[subsampling]),
    ]


def _write_directory(file: BinaryIO, link: int, tags: list[tuple[int, str, tuple[int, ...]]]) -> int:
    directory = struct.pack("<H", len(tags))
    for tag, kind, values in tags:
        packed = struct.pack(f"<{len(values)}{kind[0]}", *values) if kind in ("H", "I", "II") else bytes(values)
        if len(packed) > 4:
            file.write(b"\0" * (file.tell() % 2))
            packed, data = struct.pack("<I", file.tell()), packed
            file.write(data)
        code = {"s": 2, "H": 3, "I": 4, "II": 5, "B": 7}[kind]
        directory += struct.pack("<HHI4s", tag, code, len(values) // len(kind), packed)
    file.write(b"\0" * (file.tell() % 2))
    start = file.tell()
    file.write(directory + bytes(4))
    end = file.tell()
    file.seek(link)
    file.write(struct.pack("<I", start))
    file.seek(end)
    return end - 4


def _tiles(rgb: RGB, tile: int, quality: int, subsampling: str, photometric: str) -> Iterator[bytes]:
    for block in _blocks(rgb, tile):
        if photometric == "rgb":
            options: dict[str, Any] = {"colorspace": "rgb", "outcolorspace": "rgb", "subsampling": "444"}
            yield bytes(imagecodecs.jpeg8_encode(block, level=quality, **options))
        else:
            yield simplejpeg.encode_jpeg(block, quality=quality, colorsubsampling=subsampling)


def _blocks(rgb: RGB, tile: int) -> Iterator[RGB]:
    """Tiles row by row; those at the edge are filled up."""
    for top in range(0, rgb.shape[0], tile):
        for left in range(0, rgb.shape[1], tile):
            block = rgb[top : top + tile, left : left + tile]
            margin = ((0, tile - block.shape[0]), (0, tile - block.shape[1]), (0, 0))
            yield np.ascontiguousarray(np.pad(block, margin, mode="edge"))


def split_tables(jpeg: bytes) -> tuple[bytes, bytes]:
    """A JPEG without its tables and without anything that names its colour space; and the tables."""
    at, kept, tables = 2, b"\xff\xd8", b"\xff\xd8"
    while True:
        marker, end = jpeg[at + 1], at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        segment = bytearray(jpeg[at:end])
        if marker in (0xC0, 0xDA):  # libjpeg takes components named R, G, B for those colours
            first, step = (10, 3) if marker == 0xC0 else (5, 2)
            segment[first : first + 3 * step : step] = b"\1\2\3"
        if marker in (0xDB, 0xC4):
            tables += segment
        elif marker not in (0xE0, 0xEE):
            kept += segment
        at = end
        if marker == 0xDA:
            return kept + jpeg[at:], tables + b"\xff\xd9"


def philips_xml(levels: int, mpp: float) -> str:
    """The description of a Philips TIFF whose levels halve."""
    spacing = [f'"{mpp * 2**number / 1000!r}" "{mpp * 2**number / 1000!r}"' for number in range(levels)]

    def attribute(name: str, text: str) -> str:
        return f'<Attribute Name="{name}">{text}</Attribute>'

    sequence = "".join(
        f'<DataObject ObjectType="PixelDataRepresentation">{attribute("DICOM_PIXEL_SPACING", text)}</DataObject>'
        for text in spacing
    )
    image = (
        attribute("PIM_DP_IMAGE_TYPE", "WSI")
        + attribute("DICOM_PIXEL_SPACING", spacing[0])
        + attribute("PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE", f"<Array>{sequence}</Array>")
    )
    array = f'<Array><DataObject ObjectType="DPScannedImage">{image}</DataObject></Array>'
    return f'<DataObject ObjectType="DPUfsImport">{attribute("PIM_DP_SCANNED_IMAGES", array)}</DataObject>'


def leica_xml(sizes: Sequence[tuple[int, int]], canvas: tuple[int, int], corner: tuple[int, int], mpp: float) -> str:
    """The description of a Leica SCN: the levels of one scan, whose directories are 0, 1, ..., on a larger canvas.

    Args:
        sizes: width and height of each level, px.
        canvas: width and height, level-0 px.
        corner: x and y of the scan's upper left corner on it, level-0 px.
        mpp: microns per level-0 px.
    """

    def nm(px: int) -> int:
        return round(1000 * px * mpp)

    levels = "".join(f'<dimension sizeX="{w}" sizeY="{h}" ifd="{i}" r="{i}"/>' for i, (w, h) in enumerate(sizes))
    (width, height), (x, y) = sizes[0], corner
    view = f'<view sizeX="{nm(width)}" sizeY="{nm(height)}" offsetX="{nm(x)}" offsetY="{nm(y)}"/>'
    light = "<illuminationSettings><illuminationSource>brightfield</illuminationSource></illuminationSettings>"
    settings = f"<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>{light}</scanSettings>"
    image = f'<image><pixels sizeX="{width}" sizeY="{height}">{levels}</pixels>{view}{settings}</image>'
    collection = f'<collection sizeX="{nm(canvas[0])}" sizeY="{nm(canvas[1])}">{image}</collection>'
    return f'<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">{collection}</scn>'


def tile_span(path: Path, level: int, number: int) -> tuple[int, int]:
    """Offset and length in the file of one tile (row by row) of a level."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level]
        assert isinstance(page, tifffile.TiffPage)
        return page.dataoffsets[number], page.databytecounts[number]


def zero_tile(path: Path, level: int, number: int) -> None:
    """Overwrite the bytes of one tile with zeros: it no longer decodes."""
    offset, length = tile_span(path, level, number)
    overwrite(path, offset, bytes(length))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Change bytes of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def cut(path: Path, share: float) -> None:
    """Keep only the first share of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
