"""Slides that are stored turned or mirrored, and say so (Orientation of TIFF and EXIF), read upright.

All places are those of the upright slide. Its compressed tiles are not handed out: they show it as it is stored.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from pipeline.slides.reader import RGB, UPRIGHT, Boxes, Level, SlideReader

Pixels = npt.NDArray[Any]


class _Turn(NamedTuple):
    """What brings stored px upright: rows become columns, then columns and rows are reversed."""

    transposed: bool
    reversed_x: bool
    reversed_y: bool


_TURNS = {
    2: _Turn(transposed=False, reversed_x=True, reversed_y=False),
    3: _Turn(transposed=False, reversed_x=True, reversed_y=True),
    4: _Turn(transposed=False, reversed_x=False, reversed_y=True),
    5: _Turn(transposed=True, reversed_x=False, reversed_y=False),
    6: _Turn(transposed=True, reversed_x=True, reversed_y=False),
    7: _Turn(transposed=True, reversed_x=True, reversed_y=True),
    8: _Turn(transposed=True, reversed_x=False, reversed_y=True),
}


def orientation(image: Image.Image) -> int:
    """How an image's px as Pillow gives them are stored: those of a TIFF it has turned itself. Reads the whole PNG."""
    if image.format == "TIFF":
        return UPRIGHT
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except (SyntaxError, LookupError, TypeError, ValueError, struct.error):  # of damaged EXIF data, which say nothing
        return UPRIGHT
    return found if found in _TURNS else UPRIGHT


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Stored px (h, w) or (h, w, 3) upright, in a view; (w, h) for the orientations 5 to 8."""
    if orientation == UPRIGHT:
        return pixels
    turn = _TURNS[orientation]
    turned = pixels.swapaxes(0, 1) if turn.transposed else pixels
    return turned[:: -1 if turn.reversed_y else 1, :: -1 if turn.reversed_x else 1]


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height of stored px, upright."""
    return size[::-1] if orientation != UPRIGHT and _TURNS[orientation].transposed else size


def upright_reader(stored: SlideReader, orientation: int) -> SlideReader:
    """The slide upright; the same reader where it is so."""
    return stored if orientation == UPRIGHT else _TurnedReader(stored, orientation)


class _TurnedReader(SlideReader):
    """Turns places back and pixels upright."""

    def __init__(self, stored: SlideReader, orientation: int) -> None:
        self._stored, self._orientation, self._turn = stored, orientation, _TURNS[orientation]
        self.levels = tuple(self._level(level) for level in stored.levels)
        self.mpp = stored.mpp[::-1] if stored.mpp and self._turn.transposed else stored.mpp
        self.vendor, self.profile, self.picked = stored.vendor, stored.profile, stored.picked

    def read(self, level: int, x: int, y: int, w: int, h: int) -> RGB:
        """See `SlideReader.read`."""
        (box,) = self._back(level, np.array([[x, y, w, h]])).tolist()
        return np.ascontiguousarray(upright(self._stored.read(level, *box), self._orientation))

    def expect(self, level: int, boxes: Boxes) -> None:
        """See `SlideReader.expect`."""
        self._stored.expect(level, self._back(level, boxes))

    def forget(self) -> None:
        """See `SlideReader.forget`."""
        self._stored.forget()

    def close(self) -> None:
        """See `SlideReader.close`."""
        self._stored.close()

    def _level(self, level: Level) -> Level:
        return Level(level.height, level.width, level.downsample) if self._turn.transposed else level

    def _back(self, level: int, boxes: Boxes) -> Boxes:
        """Boxes (n, 4) of the upright slide as boxes of the stored one."""
        x, y, w, h = boxes.T
        x = self.levels[level].width - x - w if self._turn.reversed_x else x
        y = self.levels[level].height - y - h if self._turn.reversed_y else y
        return np.stack([y, x, h, w] if self._turn.transposed else [x, y, w, h], axis=1)
