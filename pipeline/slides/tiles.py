"""The compressed tiles of one level: where they lie, what they hold, and their pixels.

Three 8-bit samples a px, RGB or YCbCr, in JPEG or JPEG 2000 take the fast way. All else that tifffile decodes takes
tifffile's: RGB, also with transparency, grey, and three planes that stand one after another or in directories of
their own, in any codec of imagecodecs (LZW, deflate, Zstandard, LZMA, WebP, JPEG XL, JPEG XR, PNG, LERC, PackBits) or
none. What a strip holds is read as a tile as wide as the level.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile
from PIL import Image

from pipeline.errors import SlideError
from pipeline.formats import jpeg
from pipeline.formats.damage import check_jpeg2000, check_jpegxr, check_webp
from pipeline.slides.reader import EIGHTH, RGB, NativeTiles, on_background
from pipeline.storage.ranges import ByteSource

Table = npt.NDArray[np.uint64]
Samples = npt.NDArray[np.uint8]
Decoder = Callable[[bytes, int], Samples]
"""A tile's bytes and its number to its samples (h, w, n)."""

_JPEG, _JPEG2000, _JPEG_XR, _WEBP = 7, (33004, 33005, 34712), (34934,), (34927, 50001)
_DECODED = frozenset(
    {1, 5, 8, 32773, 32946, 34887, 34925, 34926, 34933, 50000, 50002, 52546, *_JPEG2000, *_JPEG_XR, *_WEBP}
)
"""Compressions that are left to tifffile. Not 33003, Aperio's JPEG 2000 in YCbCr, of which it would give YCbCr."""
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _YCBCR = 0, 1, 2, 6
_PREMULTIPLIED, _STRAIGHT = 1, 2  # ExtraSamples: what a sample of transparency has done to the colours
_COLOURS = (0, 1, 2)
_WHITE = np.full(3, 255, np.uint8)
_TABLE_TYPES = {3: "u2", 4: "u4", 16: "u8"}  # SHORT, LONG, LONG8
_TILES, _STRIPS = (324, 325), (273, 279)  # offsets and lengths
MAX_TILE_PX = 2**28  # a tile is decoded whole: 268 MPx are 805 MB of RGB


@dataclass(frozen=True)
class TiledPage:
    """The tiles of one level."""

    tiles: NativeTiles
    offsets: Table
    """(planes * columns * rows,) plane by plane, row by row."""
    lengths: Table
    """Zero where the slide declares that it holds no data."""
    rgb: bool
    """The directory says that the components of JPEGs are RGB, not YCbCr."""
    tables: bytes
    """Shared JPEG tables, as segments."""
    decoders: tuple[Decoder, ...]
    """One a plane; none where the tiles take the fast way."""
    negative: bool = False
    """Grey whose 0 is white."""
    premultiplied: bool = False
    """Of px with transparency: the colours are multiplied with it already."""
    order: tuple[int, ...] = _COLOURS
    """Number of the red, green and blue one of three samples."""

    @property
    def planes(self) -> int:
        """How many tiles lie over one another."""
        return max(1, len(self.decoders))


def tiled_page(source: ByteSource, page: tifffile.TiffPage, order: tuple[int, ...] | None = None) -> TiledPage | None:
    """One level's tiles; None where their pixels are not for us.

    Args:
        source: the file.
        page: the directory.
        order: number of the red, green and blue sample, where the directory does not say that they are such.

    Raises:
        SlideError: "too-large", a tile is.
    """
    edges = (page.imagewidth, page.imagelength, *_tile_size(page))
    width, height, tile_width, tile_height = map(operator.index, edges)  # TypeError: damaged, a tag of another type
    columns, rows = -(-width // tile_width), -(-height // tile_height)
    codec, decoders = _codec(page, order)
    offsets, lengths = (_table(source, page, code) for code in (_TILES if page.is_tiled else _STRIPS))
    if codec is None or not len(offsets) == len(lengths) == max(1, len(decoders)) * columns * rows:
        return None
    if tile_width * tile_height > MAX_TILE_PX:
        raise SlideError(
            "too-large",
            f"{source.name}: a tile or strip of {tile_width} x {tile_height} px is over {MAX_TILE_PX} px; convert it, "
            "e.g. `vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg`",
        )
    return TiledPage(
        NativeTiles(tile_width, tile_height, columns, rows, codec),
        offsets,
        lengths,
        rgb=int(page.photometric) == _RGB,
        tables=jpeg.tables_segments(page.jpegtables),
        decoders=decoders,
        negative=int(page.photometric) == _MIN_IS_WHITE,
        premultiplied=_PREMULTIPLIED in page.extrasamples,
        order=order or _COLOURS,
    )


def joined(planes: Sequence[TiledPage | None]) -> TiledPage | None:
    """Red, green and blue of one level, which stand in directories of their own; None where they are no such."""
    if len(planes) == 1:
        return planes[0]
    known = [plane for plane in planes if plane is not None]
    first = known[0] if known else None
    alike = first is not None and all(plane.tiles == first.tiles and len(plane.decoders) == 1 for plane in known)
    if first is None or len(known) != len(planes) or not alike:
        return None
    return replace(
        first,
        offsets=np.concatenate([plane.offsets for plane in known]),
        lengths=np.concatenate([plane.lengths for plane in known]),
        decoders=tuple(decoder for plane in known for decoder in plane.decoders),
    )


def checked(page: TiledPage, data: bytes) -> bytes:
    """A tile that takes the fast way as a file of its own.

    Raises:
        ValueError: it is no image of the tile's size, or plainly damaged.
    """
    if page.tiles.codec == "jpeg2000":
        check_jpeg2000(data, (page.tiles.width, page.tiles.height))
        return data
    header = jpeg.header(data)
    _check_size(page, header.width, header.height)
    whole = jpeg.standalone(data, page.tables, page.rgb, header)
    if jpeg.is_doubtful(data, header):
        simplejpeg.decode_jpeg(whole)
    return whole


def decoded(page: TiledPage, parts: Sequence[bytes], number: int, out: RGB) -> RGB:
    """Pixels of a tile, in `out` where the decoder can.

    Args:
        page: the level.
        parts: the tile's bytes, one a plane.
        number: of the tile, row by row.
        out: (height, width, 3) room for a tile.

    Raises:
        ValueError, RuntimeError: it cannot be decoded.
    """
    if page.decoders:
        pixels = _as_rgb(page, [decode(data, number) for decode, data in zip(page.decoders, parts, strict=True)])
    elif page.tiles.codec == "jpeg":
        pixels = simplejpeg.decode_jpeg(jpeg.standalone(parts[0], page.tables, page.rgb), buffer=out)
    else:
        import imagecodecs  # 0.1 s, which slides without JPEG 2000 need not pay

        check_jpeg2000(parts[0], (page.tiles.width, page.tiles.height))
        pixels = imagecodecs.jpeg2k_decode(parts[0])
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"its pixels are {pixels.dtype} of shape {pixels.shape}")
    _check_size(page, pixels.shape[1], pixels.shape[0])
    return pixels


def eighth(page: TiledPage, data: bytes, width: int, height: int, out: RGB) -> RGB:
    """An eighth of a JPEG tile of which width x height px lie on the slide, in `out`; errors as `decoded`.

    The decoder gives the means of whole blocks. Where blocks lie across the slide's edge, what scanners put beyond it
    would count, so the tile is decoded in full.
    """
    if width % EIGHTH or height % EIGHTH:
        whole = decoded(page, [data], 0, np.empty((page.tiles.height, page.tiles.width, 3), np.uint8))
        part = np.asarray(Image.fromarray(whole[:height, :width]).reduce(EIGHTH))
        out[: part.shape[0], : part.shape[1]] = part
        return out
    header = jpeg.header(data)
    _check_size(page, header.width, header.height)
    tile = jpeg.standalone(data, page.tables, page.rgb, header)
    pixels: RGB = simplejpeg.decode_jpeg(tile, min_height=out.shape[0], min_width=out.shape[1], buffer=out)
    return pixels


def _codec(
    page: tifffile.TiffPage, order: tuple[int, ...] | None
) -> tuple[Literal["jpeg", "jpeg2000", "other"] | None, tuple[Decoder, ...]]:
    """What the tiles are coded in, None where that is not for us; and who decodes each plane."""
    compression, photometric, samples = int(page.compression), int(page.photometric), int(page.samplesperpixel)
    if page.dtype != np.uint8 or page.bitspersample != 8 or page.imagedepth != 1:
        return None, ()
    separate = samples > 1 and int(page.planarconfig) == 2
    if page.is_tiled and (samples, separate) == (3, False):
        if compression == _JPEG and photometric in (_RGB, _YCBCR):
            return "jpeg", ()
        if compression in _JPEG2000 and photometric == _RGB:
            return "jpeg2000", ()
    if not _is_plain(page, order):
        return None, ()
    if compression == _JPEG and (separate or samples in (1, 3)):  # four would be taken for CMYK
        decoder: Decoder = partial(_by_simplejpeg, page, jpeg.tables_segments(page.jpegtables))
        return "other", (decoder,) * (samples if separate else 1)
    if compression in _DECODED:
        return "other", (partial(_by_tifffile, page),) * (samples if separate else 1)
    return None, ()


def _is_plain(page: tifffile.TiffPage, order: tuple[int, ...] | None) -> bool:
    """Whether samples are grey or red, green and blue as they stand, with or without transparency."""
    if order is not None:
        return True
    jpeg_strips = int(page.compression) == _JPEG and not page.is_tiled
    colours = {_MIN_IS_WHITE: 1, _MIN_IS_BLACK: 1, _RGB: 3, _YCBCR: 3 if jpeg_strips else None}.get(
        int(page.photometric)
    )
    more = tuple(page.extrasamples)
    return colours is not None and (
        int(page.samplesperpixel) == colours + len(more) and more in ((), (_PREMULTIPLIED,), (_STRAIGHT,))
    )


def _by_tifffile(page: tifffile.TiffPage, data: bytes, number: int) -> Samples:
    compression = int(page.compression)
    if compression in _JPEG2000:
        check_jpeg2000(data, _tile_size(page), int(page.samplesperpixel))
    elif compression in _JPEG_XR:
        check_jpegxr(data)
    elif compression in _WEBP:
        check_webp(data, math.prod(_tile_size(page)))
    samples: Samples = page.decode(data, number, _fullsize=True)[0][0]  # of a volume that is one plane deep
    return samples


def _by_simplejpeg(page: tifffile.TiffPage, tables: bytes, data: bytes, number: int) -> Samples:
    """Stricter than tifffile, which lets libjpeg fill damage with grey."""
    header = jpeg.header(data)
    whole = jpeg.standalone(data, tables, int(page.photometric) == _RGB, header)
    samples: Samples = simplejpeg.decode_jpeg(whole, colorspace="GRAY" if len(header.components) == 1 else "RGB")
    height = _tile_size(page)[1]
    missing = height - len(samples)
    if not page.is_tiled and missing > 0 and (number + 1) * height - missing == page.imagelength:  # the last strip
        samples = np.pad(samples, ((0, missing), (0, 0), (0, 0)))
    return samples


def _as_rgb(page: TiledPage, planes: Sequence[Samples]) -> RGB:
    """Samples of one px as its colour; what is transparent lies on white."""
    pixels = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
    samples = pixels.shape[2]
    if samples in (1, 2):
        grey = 255 - pixels[..., :1] if page.negative else pixels[..., :1]
        pixels = np.concatenate([np.repeat(grey, 3, axis=2), pixels[..., 1:]], axis=2)
    if samples in (2, 4):
        if not page.premultiplied:
            return on_background(pixels, _WHITE)
        pixels = np.minimum(255, pixels[..., :3].astype(np.uint16) + (255 - pixels[..., 3:])).astype(np.uint8)
    return pixels if page.order == _COLOURS else pixels[..., page.order]


def _check_size(page: TiledPage, width: int, height: int) -> None:
    if (width, height) != (page.tiles.width, page.tiles.height):
        raise ValueError(f"it is an image of {width} x {height} px, not {page.tiles.width} x {page.tiles.height}")


def _tile_size(page: tifffile.TiffPage) -> tuple[int, int]:
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)


def _table(source: ByteSource, page: tifffile.TiffPage, code: int) -> Table:
    """A tag of offsets or lengths, as an array from the start: as Python numbers it would take 5 times the memory."""
    tag = page.tags[code]
    kind = np.dtype(page.parent.byteorder + _TABLE_TYPES[int(tag.dtype)])
    if tag.count * kind.itemsize <= page.parent.tiff.tagoffsetthreshold:  # stands in the directory itself
        return np.atleast_1d(np.array(tag.value, np.uint64))
    (data,) = source.read([(tag.valueoffset, tag.count * kind.itemsize)])
    return np.frombuffer(data, kind).astype(np.uint64)
