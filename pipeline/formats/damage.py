"""Damage that is plain to see in tiles whose decoders do not see it, and fill it with some picture.

That is a lost end, and a lost block in the middle that was read as zeros. Other damage does not show: bits that flip,
or data of another place, decode to some picture, because such coders take any bits for data. JPEGs are `jpeg`'s; other
codecs notice both (deflate, LZW, LZMA, Zstandard, PNG, LERC, JPEG XL), and what is not compressed shows nothing.
"""

from __future__ import annotations

import struct

from pipeline.formats.jpeg import ZERO_RUN

_START, _END, _DATA = b"\xff\x4f\xff\x51", b"\xff\xd9", b"\xff\x93"  # SOC and SIZ, EOC, SOD
_PX_PER_ZERO = 8192  # of a blank WebP: 400 zeros in a row at 2048 x 2048 px, 104 at 1024 x 1024, else under 10
_XR_ZEROS = 4096
_XR_OFFSET, _XR_LENGTH = 0xBCC0, 0xBCC1  # of the coded image in a JPEG XR
_SIZ, _COD, _SOT = 0x51, 0x52, 0x90


def check_jpeg2000(codestream: bytes, size: tuple[int, int], components: int = 3) -> None:
    """Raise where a tile, a codestream or one in boxes, is plainly damaged or too large; nothing is decoded.

    Args:
        codestream: the tile's bytes.
        size: width and height that it may have: the decoder believes what it says, and sets memory aside for it.
        components: that it may have.

    Raises:
        ValueError: says what is wrong.
    """
    end = codestream.rfind(_END)  # coded data never hold a marker
    if end < 0:
        raise ValueError("it ends before its end marker")
    _check_size(codestream, size, components)
    longest = _longest_zeros(codestream)
    if longest is not None and codestream.find(bytes(longest + 1), codestream.find(_DATA), end) >= 0:
        raise ValueError(f"over {longest} zeros within its data")


def check_webp(data: bytes, px: int) -> None:
    """Raise where a tile of so many px is plainly damaged; its decoder itself notices a lost end.

    Raises:
        ValueError: says what is wrong.
    """
    longest = len(ZERO_RUN) + px // _PX_PER_ZERO
    if data.find(bytes(longest + 1)) >= 0:
        raise ValueError(f"over {longest} zeros within its data")


def check_jpegxr(data: bytes) -> None:
    """Raise where a tile lost its end, or a page of its data; sound ones have up to 600 zeros in a row.

    Raises:
        ValueError: says what is wrong.
    """
    try:
        (start,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, start)
        fields = [struct.unpack_from("<HHII", data, start + 2 + 12 * number) for number in range(count)]
    except struct.error:
        raise ValueError("it ends within its header") from None
    values = {tag: value for tag, _, _, value in fields}
    if values.get(_XR_OFFSET, 0) + values.get(_XR_LENGTH, 0) > len(data):
        raise ValueError("it ends before its data do")
    if data.find(bytes(_XR_ZEROS)) >= 0:
        raise ValueError(f"{_XR_ZEROS} zeros within its data")


def _check_size(codestream: bytes, size: tuple[int, int], components: int) -> None:
    """Of the image's own header, which is the first of the codestream: SIZ."""
    siz = codestream.find(_START) + 8
    fields = codestream[siz : siz + 34]
    if siz < 8 or len(fields) < 34:
        raise ValueError("it ends within its header")
    right, bottom, left, top = struct.unpack(">IIII", fields[:16])
    if right - left > size[0] or bottom - top > size[1]:
        raise ValueError(f"it is an image of {right - left} x {bottom - top} px, not {size[0]} x {size[1]}")
    (found,) = struct.unpack(">H", fields[32:])
    if found > components:
        raise ValueError(f"it has {found} components, not {components}")


def _longest_zeros(codestream: bytes) -> int | None:
    """Bytes of zeros that sound data may hold: a packet without data is one, and a blank tile has many in a row.

    None where that is not known: precincts of a stated size make any number of packets.
    """
    at = codestream.find(_START) + 2
    components = None
    try:
        while at >= 2 and codestream[at + 1] != _SOT:
            marker, body = codestream[at + 1], at + 4
            if marker == _SIZ:
                components = codestream[body + 34] << 8 | codestream[body + 35]
            elif marker == _COD:
                style, layers, levels = codestream[body], codestream[body + 2 : body + 4], codestream[body + 5]
                packets = int.from_bytes(layers, "big") * (levels + 1) * (components or 0)
                return None if style & 1 else len(ZERO_RUN) + packets
            at += 2 + (codestream[at + 2] << 8 | codestream[at + 3])
    except IndexError:
        pass
    return None
