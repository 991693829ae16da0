"""JPEG 2000 at the level of its codestream: damage that is plain to see, which its decoder fills with smooth colour.

That is a lost end, and a lost block in the middle that was read as zeros. Other damage does not show: bits that flip,
or data of another place, decode to some picture, because the coder takes any bits for data.
"""

from __future__ import annotations

from pipeline.slides.jpeg import ZERO_RUN

_START, _END, _DATA = b"\xff\x4f\xff\x51", b"\xff\xd9", b"\xff\x93"  # SOC and SIZ, EOC, SOD
_SIZ, _COD, _SOT = 0x51, 0x52, 0x90


def check(codestream: bytes) -> None:
    """Raise where a tile, a codestream or one in boxes, is plainly damaged; nothing is decoded.

    Raises:
        ValueError: says what is wrong.
    """
    end = codestream.rfind(_END)  # coded data never hold a marker
    if end < 0:
        raise ValueError("it ends before its end marker")
    longest = _longest_zeros(codestream)
    if longest is not None and codestream.find(bytes(longest + 1), codestream.find(_DATA), end) >= 0:
        raise ValueError(f"over {longest} zeros within its data")


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
