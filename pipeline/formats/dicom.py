"""Which series a DICOM file is of, and what in it: its elements are walked up to the data set's own (0020,000E).

A search for the tag would find that of a referenced series, which stands in a sequence before it. Explicit and
implicit little endian, which is what slides come in; of the others nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PREAMBLE = 132  # bytes before the first element, with the magic at their end
WINDOW = 16 * 2**10  # bytes read at a time; nearly all files need one window
MAX_WINDOWS = 64  # longer headers, such as of thousands of references without a length, are given up
_IMAGE_TYPE, _CLASS, _STUDY, _SERIES = (0x0008, 0x0008), (0x0008, 0x0016), (0x0020, 0x000D), (0x0020, 0x000E)
_SLIDE = b"1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
_SYNTAX = (0x0002, 0x0010)
_IMPLICIT = b"1.2.840.10008.1.2"
_UNKNOWN = (b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99")  # big endian, deflated
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_MAX_VALUE = 128  # bytes read of a value; a UID has 64 at most
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xE000, 0xE00D, 0xE0DD

Read = Callable[[int, int], bytes]
"""(start, length) -> the file's bytes; fewer where it ends before."""


class _EndError(Exception):
    """The file, or what may be read of it, ends."""


@dataclass(frozen=True)
class Head:
    """What a DICOM file says of itself; empty where it does not."""

    series: bytes
    """Series instance UID, never empty."""
    study: bytes
    """Study instance UID."""
    sop_class: bytes
    image_type: tuple[bytes, ...]

    @property
    def is_slide(self) -> bool:
        """Whether it is an image of a slide, where others are annotations, segmentations or maps of one."""
        return self.sop_class == _SLIDE

    @property
    def is_reduced(self) -> bool:
        """Whether it is an image of the tissue at less than full resolution."""
        return self.is_slide and self.image_type[2:4] == (b"VOLUME", b"RESAMPLED")

    @property
    def is_full(self) -> bool:
        """Whether it is an image of the tissue at full resolution, or may be one."""
        return self.is_slide and self.image_type[2:3] in ((), (b"VOLUME",)) and not self.is_reduced


def read_head(read: Read) -> Head | None:
    """Of a file; None where it is no DICOM file, or names no series."""
    window = _Window(read)
    try:
        return _walk(window) if window.take(PREAMBLE - 4, 4) == b"DICM" else None
    except _EndError:
        return None


class _Window:
    """Few reads for many small pieces in ascending order."""

    def __init__(self, read: Read) -> None:
        self._read, self._start, self._data, self._left = read, 0, b"", MAX_WINDOWS

    def take(self, start: int, length: int) -> bytes:
        """Exactly these bytes, at most `WINDOW`."""
        if start + length > self._start + len(self._data):
            if not self._left:
                raise _EndError
            self._left -= 1
            begin = start if self._data else 0  # a file's preamble comes with its first elements
            self._start, self._data = begin, self._read(begin, WINDOW)
        piece = self._data[start - self._start : start - self._start + length]
        if len(piece) < length:
            raise _EndError
        return piece


def _walk(window: _Window) -> Head | None:
    """The values, past everything that is nested."""
    at, syntax = PREAMBLE, b""
    nested: list[bool] = []  # of each sequence or item without a length that is open: whether it is implicit
    values: dict[tuple[int, int], bytes] = {}
    while True:
        implicit = nested[-1] if nested else syntax == _IMPLICIT
        tag, vr, start, length = _element(window, at, implicit=implicit)
        if tag in ((0xFFFE, _ITEM_END), (0xFFFE, _SEQUENCE_END)):
            if not nested:
                return None
            nested.pop()
        elif length == _UNDEFINED:
            nested.append(implicit or vr == b"UN")  # what had no known type is written implicit
        elif not nested and tag > _SERIES:  # elements ascend
            return None
        elif not nested and tag in (_SYNTAX, _IMAGE_TYPE, _CLASS, _STUDY, _SERIES):
            values[tag] = window.take(start, min(length, _MAX_VALUE)).rstrip(b"\0 ")
            syntax = values.get(_SYNTAX, b"")
            if syntax in _UNKNOWN:
                return None
            if tag == _SERIES:
                return _head(values)
        at = start if length == _UNDEFINED else start + length


def _head(values: dict[tuple[int, int], bytes]) -> Head | None:
    kinds = tuple(part.strip() for part in values.get(_IMAGE_TYPE, b"").split(b"\\") if part.strip())
    series = values[_SERIES]
    return Head(series, values.get(_STUDY, b""), values.get(_CLASS, b""), kinds) if series else None


def _element(window: _Window, at: int, *, implicit: bool) -> tuple[tuple[int, int], bytes, int, int]:
    """Tag, type (none where implicit), start and length of the value of the element at an offset."""
    head = window.take(at, 8)
    tag = int.from_bytes(head[:2], "little"), int.from_bytes(head[2:4], "little")
    if tag[0] == 0xFFFE or (implicit and tag[0] != 0x0002):  # the file's own head is always explicit
        return tag, b"", at + 8, int.from_bytes(head[4:], "little")
    vr = head[4:6]
    if vr in _LONG:
        return tag, vr, at + 12, int.from_bytes(window.take(at + 8, 4), "little")
    return tag, vr, at + 8, int.from_bytes(head[6:], "little")
