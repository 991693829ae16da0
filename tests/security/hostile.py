"""Files that were made to break whoever reads them, each of a few kB to a few MB, and the reasons they should get."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import imagecodecs
import numpy as np
import simplejpeg
from PIL import Image

from tests.synth import tissue_rgb, write_pyramid

Tag = tuple[int, str, Sequence[int]]
"""Code, type (H, I, s) and values; of type Z a raw entry: TIFF's type, count and value."""

RGB = tissue_rgb(613, 487)
_TYPES = {"s": 2, "H": 3, "I": 4}
_BILLION = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
OME = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image><Pixels {}/></Image></OME>'


@dataclass(frozen=True)
class Hostile:
    """One of the catalogue."""

    make: Callable[[Path], str]
    """Writes it into a folder; its URI."""
    reasons: tuple[str, ...]
    """One of which its quarantine should name; what a library makes of damage may change with its version. None: its
    pixels are sound, and may be read."""
    mpp: float | None = None
    """Override in the cohort."""


def directory(tags: Sequence[Tag], at: int, following: int = 0) -> bytes:
    """A TIFF directory that stands at a byte, with what does not fit into its entries behind it."""
    entries, beyond = b"", b""
    end = at + 2 + 12 * len(tags) + 4
    for code, kind, values in sorted(tags):
        if kind == "Z":
            entries += struct.pack("<HHII", code, *values)
            continue
        packed = bytes(values) if kind == "s" else struct.pack(f"<{len(values)}{kind}", *values)
        value = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", end + len(beyond))
        beyond += packed if len(packed) > 4 else b""
        entries += struct.pack("<HHI", code, _TYPES[kind], len(values)) + value
    return struct.pack("<H", len(tags)) + entries + struct.pack("<I", following) + beyond


def tiff(
    folder: Path, *, size: tuple[int, int], tile: tuple[int, int], data: bytes, more: Sequence[Tag] = (),
    compression: int = 7, tiles: int = 1, following: Callable[[int], int] = lambda at: 0, name: str = "hostile.tiff",
) -> str:  # fmt: skip
    """A tiled TIFF all of whose tiles have the same bytes; `more` tags go before those of the same code."""
    photometric = 6 if compression == 7 else 2
    at = 8 + len(data)
    plain: list[Tag] = [
        (256, "I", [size[0]]), (257, "I", [size[1]]), (258, "H", [8, 8, 8]), (259, "H", [compression]),
        (262, "H", [photometric]), (277, "H", [3]), (322, "I", [tile[0]]), (323, "I", [tile[1]]),
        (324, "I", [8] * tiles), (325, "I", [len(data)] * tiles), (282, "Z", [5, 1, at]), (283, "Z", [5, 1, at]),
        (296, "H", [3]),
    ]  # fmt: skip
    given = {tag[0] for tag in more}
    tags = [*more, *(tag for tag in plain if tag[0] not in given)]
    resolution = struct.pack("<II", 20_000, 1)  # px per cm: 0.5 um
    start = at + len(resolution)
    path = folder / name
    head = struct.pack("<2sHI", b"II", 42, start)
    path.write_bytes(head + data + resolution + directory(tags, start, following(start)))
    return str(path)


def jpeg(edge: int) -> bytes:
    """Tissue without end, and so with texture."""
    rng = np.random.default_rng(1)
    rgb = rng.integers((150, 60, 130), (200, 110, 190), size=(edge, edge, 3), dtype=np.uint8)
    return bytes(simplejpeg.encode_jpeg(rgb, quality=40, colorsubsampling="420"))


def deflated(block: bytes, times: int) -> bytes:
    """A block so many times over, in a thousandth of it: packed once, because blocks may be made to stand alone."""
    packer = zlib.compressobj(9)
    start = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    middle = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    check = 1
    for _ in range(times):
        check = zlib.adler32(block, check)
    return start + middle * (times - 1) + b"\x03\x00" + struct.pack(">I", check)


def zeros(count: int) -> bytes:
    """So many, rounded down to MiB."""
    return deflated(bytes(2**20), count >> 20)


def png(folder: Path, edge: int) -> str:
    """A square of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = deflated((b"\0" + bytes((180, 90, 160)) * edge) * 40, edge // 40)
    head = struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0)
    path = folder / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return str(path)


def declared_jpeg(folder: Path) -> str:
    """A JPEG that says it has 65,500 px a side."""
    data = bytearray(jpeg(64))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    (folder / "declared.jpg").write_bytes(data)
    return str(folder / "declared.jpg")


def declared_jpeg2000(folder: Path) -> str:
    """Tiles that say they have two thousand million px a side."""
    sink = io.BytesIO()
    Image.fromarray(RGB[:64, :64]).save(sink, "JPEG2000", no_jp2=True)
    data = bytearray(sink.getvalue())
    at = data.index(b"\xff\x51") + 6
    data[at : at + 8] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    return tiff(folder, size=(512, 512), tile=(64, 64), data=bytes(data), compression=34712, tiles=64)


def lzw(folder: Path) -> str:
    """Tiles of LZW that unpack to a thousand times of what they should hold."""
    data = imagecodecs.lzw_encode(bytes(2**26))
    return tiff(folder, size=(512, 512), tile=(64, 64), data=bytes(data), compression=5, tiles=64)


def strip(folder: Path) -> str:
    """One strip of 30,000 px a side, deflated."""
    more: list[Tag] = [(273, "I", [8]), (278, "I", [30_000]), (279, "I", [2**20])]
    path = Path(tiff(folder, size=(30_000, 30_000), tile=(16, 16), data=zeros(2**26), more=more, compression=8))
    data = bytearray(path.read_bytes())
    for code in (322, 323, 324, 325):  # no tiles: unknown codes
        at = data.rindex(struct.pack("<HH", code, 4))
        data[at : at + 2] = struct.pack("<H", code + 40_000)
    path.write_bytes(data)
    return str(path)


def circle(folder: Path) -> str:
    """A second directory that leads back to the first."""
    path = Path(tiff(folder, size=(512, 512), tile=(64, 64), data=jpeg(64), tiles=64, following=lambda at: 8))
    data = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", data, 4)
    struct.pack_into("<I", data, first + 2 + 12 * struct.unpack_from("<H", data, first)[0], len(data))
    path.write_bytes(data + directory([(256, "I", [1])], len(data), first))
    return str(path)


def pages(folder: Path) -> str:
    """A chain of 40,000 directories."""
    path = Path(tiff(folder, size=(512, 512), tile=(64, 64), data=jpeg(64), tiles=64))
    data = bytearray(path.read_bytes())
    first = struct.unpack_from("<I", data, 4)[0]
    link = first + 2 + 12 * struct.unpack_from("<H", data, first)[0]
    for _ in range(40_000):
        struct.pack_into("<I", data, link, len(data))
        link = len(data) + 2 + 12
        data += directory([(256, "I", [1])], len(data))
    path.write_bytes(data)
    return str(path)


def good_tiff(folder: Path, name: str = "good.tiff", **options: object) -> Path:
    return write_pyramid(folder / name, RGB, levels=2, **options)  # type: ignore[arg-type]


def described(folder: Path, text: str) -> str:
    return str(good_tiff(folder, "described.tiff", mpp=None, description=text))


def cut(folder: Path, share: float | int) -> str:
    """A sound slide's first bytes: so many, or a share of them."""
    path = good_tiff(folder, "cut.tiff")
    data = path.read_bytes()
    path.write_bytes(data[: share if isinstance(share, int) else int(share * len(data))])
    return str(path)


def special(folder: Path, kind: str) -> str:
    path = folder / f"{kind}.tif"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return str(path)


def named(folder: Path, name: str) -> str:
    return str(folder / name)


def of_good(folder: Path) -> str:
    return str(good_tiff(folder))


_BROKEN = ("not-a-slide", "unopenable", "unreadable", "truncated", "bad-tiles", "no-tissue", "crash")
_TILE = jpeg(64)


def small(more: Sequence[Tag] = (), following: Callable[[int], int] = lambda at: 0) -> Callable[[Path], str]:
    return partial(tiff, size=(512, 512), tile=(64, 64), data=_TILE, tiles=64, more=more, following=following)


CATALOGUE: dict[str, Hostile] = {
    "a deflated tile of 200,000 px": Hostile(
        partial(tiff, size=(200_000,) * 2, tile=(200_000,) * 2, data=zeros(2**20), compression=8), ("too-large",)
    ),
    "a JPEG tile of 200,000 px": Hostile(
        partial(tiff, size=(200_000,) * 2, tile=(200_000,) * 2, data=jpeg(512)), ("too-large",)
    ),
    "a tile of 16 px in a picture of four thousand million": Hostile(
        partial(tiff, size=(2**32 - 1,) * 2, tile=(16, 16), data=jpeg(16)), ("too-large",)
    ),
    "8,000 tiles of the same bytes": Hostile(
        partial(tiff, size=(204_800, 163_840), tile=(2048, 2048), data=jpeg(2048), tiles=8000), ("too-large",)
    ),
    "5,000 deflated tiles of the same bytes": Hostile(
        partial(tiff, size=(409_600, 204_800), tile=(4096,) * 2, data=zeros(3 * 2**24), tiles=5000, compression=8),
        ("too-expensive",),
    ),
    "a PNG of 20,000 px": Hostile(partial(png, edge=20_000), ("too-large",), 0.5),
    "a PNG of 16,000 px": Hostile(partial(png, edge=16_000), ("artefact",), 0.5),
    "a strip of 30,000 px": Hostile(strip, ("too-large", "not-a-slide", "unreadable"), 0.5),
    "a JPEG that declares 65,500 px": Hostile(declared_jpeg, ("too-large",), 0.5),
    "JPEG 2000 that declares a million million px": Hostile(declared_jpeg2000, ("unreadable",)),
    "LZW that holds a thousand times too much": Hostile(lzw, ("unreadable", "no-tissue")),
    "a directory that follows itself": Hostile(small(following=lambda at: at), ("unreadable",)),
    "two directories that follow each other": Hostile(circle, ("unreadable",)),
    "a directory below itself": Hostile(small(more=[(330, "I", [8 + len(_TILE) + 8])]), ("unreadable",)),
    "40,000 directories": Hostile(pages, ("too-large",)),
    "no header": Hostile(partial(cut, share=6), _BROKEN),
    "a header alone": Hostile(partial(cut, share=8), _BROKEN),
    "half of its tiles": Hostile(partial(cut, share=0.4), ("truncated",)),
    "a directory that is cut off": Hostile(partial(cut, share=0.995), ("truncated", *_BROKEN)),
    "infinite microns in an Aperio header": Hostile(
        partial(described, text="Aperio Image Library |AppMag = 20|MPP = inf"), ("missing-mpp",)
    ),
    "infinite microns in OME-XML": Hostile(
        partial(described, text=OME.format('SizeX="613" SizeY="487" PhysicalSizeX="inf" PhysicalSizeY="inf"')),
        ("missing-mpp",),
    ),
    "infinite microns in the tags": Hostile(
        small(more=[(282, "Z", [5, 1, 0]), (283, "Z", [5, 1, 0])]), ("missing-mpp", "absurd-mpp")
    ),
    "a thousand million entities": Hostile(
        partial(described, text=f'<!DOCTYPE OME [<!ENTITY a0 "ha">{_BILLION}]><OME>&a9;</OME>'),
        ("missing-mpp", *_BROKEN),
    ),
    "a folder": Hostile(partial(special, kind="folder"), ("directory",)),
    "a pipe": Hostile(partial(special, kind="pipe"), ("not-a-file",)),
    "a device": Hostile(partial(special, kind="device"), ("not-a-file",)),
    "no px": Hostile(partial(tiff, size=(0, 0), tile=(64, 64), data=jpeg(64)), ("unreadable",)),
    "tiles of no px": Hostile(small(more=[(322, "I", [0]), (323, "I", [0])]), _BROKEN),
    "tiles beyond the file": Hostile(small(more=[(324, "I", [2**31] * 64)]), ("unreadable",)),
    "four thousand million tiles": Hostile(
        small(more=[(324, "Z", [4, 2**32 - 1, 8]), (325, "Z", [4, 2**32 - 1, 8])]), _BROKEN
    ),
    "a description of four gigabytes": Hostile(small(more=[(270, "Z", [2, 2**32 - 1, 8])]), ()),
    "negative sizes": Hostile(small(more=[(256, "Z", [9, 1, 2**32 - 64]), (322, "Z", [9, 1, 2**32 - 64])]), _BROKEN),
    "a NUL in its name": Hostile(partial(named, name="a\0b.tiff"), ("missing",)),
    "a new line in its name": Hostile(partial(named, name="a\nb.tiff"), ("missing",)),
    "half a character in its name": Hostile(partial(named, name="a\ud800b.tiff"), ("missing",)),
    "infinite microns in the cohort": Hostile(of_good, ("absurd-mpp",), float("inf")),
    "microns that are no number": Hostile(of_good, ("absurd-mpp",), float("nan")),
    "no microns": Hostile(of_good, ("absurd-mpp",), 0.0),
    "negative microns": Hostile(of_good, ("absurd-mpp",), -0.5),
}
