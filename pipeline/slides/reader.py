"""What every open slide offers, whichever library reads it: levels, pixels of a box, compressed tiles, an overview.

Pixels come out as uint8 RGB. Where a slide declares that it holds no data (sparse tiles) the background is
white glass; where data cannot be decoded an error is raised, never white.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from pipeline.errors import BadTileError, SlideError
from pipeline.units import Box

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Boxes = npt.NDArray[np.int64]
Block = tuple[int, int, int]
"""Top, left and edge of a square of an overview, in its px."""
LevelBox = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of a level, in its px."""
Mpp = tuple[float, float]
"""Microns per px along x and y."""

EIGHTH = 8  # px along a JPEG's blocks, whose means stand in its data: a decoder gives them without the rest
BLOCK_PX = 1024  # edge of the blocks an overview is read in: 4 MB of RGBA, whatever the slide's size
SMALLEST_PX = 128  # a block that fails is quartered down to this edge, so a bad tile costs about itself
SHAPE = 0.02  # how far the width to height of a level may be from the slide's
NOT_SQUARE = 0.02  # share by which px may be longer than wide: real scanners state x and y with other rounding
UPRIGHT = 1  # the orientation of TIFF and EXIF that needs no turn
UNREAD = 128  # grey of what an overview could not read: neither glass nor tissue


@dataclass(frozen=True)
class Level:
    """One level of a slide's pyramid."""

    width: int
    height: int
    downsample: float
    """Level-0 px per px of this level."""


@dataclass(frozen=True)
class NativeTiles:
    """How a level is cut into compressed tiles, from its upper left corner; the last ones reach over its edge."""

    width: int
    """Of a tile, in px of the level."""
    height: int
    columns: int
    rows: int
    codec: Literal["jpeg", "jpeg2000", "other"]
    """other: a tile is no file of its own (`SlideReader.raw_tile`)."""


@dataclass(frozen=True)
class Picked:
    """Which of a file's images is read."""

    series: int
    """Its number in the file."""
    name: str
    of: int
    """Images that the file holds."""
    plane: str | None
    """Which of several focal planes or times, in words."""
    named: bool
    """The cohort named it, and unasked another one, or none, would have been taken."""


@dataclass(frozen=True)
class Overview:
    """A whole slide at low resolution."""

    rgb: RGB
    """(h, w, 3)."""
    unread: Mask
    """(h, w): where the slide's data could not be decoded; `rgb` is grey there."""
    scale: float
    """Level-0 px per overview px."""


class SlideReader(ABC):
    """An open slide. Not thread-safe and not picklable: open one per task."""

    levels: tuple[Level, ...]
    mpp: Mpp | None
    """Microns per level-0 px as the file states them, positive but else unchecked; None when it states none."""
    vendor: str
    profile: str | None
    """Description of the file's ICC profile, which says how its colours are meant. It is not applied."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour of glass where there is no data."""
    picked: Picked | None = None
    """Which of the file's images this is; None where the library that reads it picks, or there is but one."""

    @property
    def series(self) -> int | None:
        """Which image of the file it is, where the file alone does not say."""
        return self.picked.series if self.picked is not None and self.picked.named else None

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height in level-0 px."""
        return self.levels[0].width, self.levels[0].height

    @property
    def bounds(self) -> Box:
        """Where on the slide the scan lies: QuPath shows nothing else, and counts from its upper left corner."""
        return Box(0, 0, *self.dimensions)

    @abstractmethod
    def read(self, level: int, x: int, y: int, w: int, h: int) -> RGB:
        """Pixels (h, w, 3) of a box inside a level; x, y, w, h in px of that level.

        Raises:
            BadTileError: the data there cannot be decoded; the reader stays usable.
            SlideError: the slide is gone or broken as a whole.
        """

    def read_over(self, level: int, x: int, y: int, w: int, h: int) -> RGB:
        """As `read`, of a box that may reach over the right and lower edge, where it is background."""
        size = self.levels[level]
        inside = self.read(level, x, y, min(w, size.width - x), min(h, size.height - y))
        if inside.shape[:2] == (h, w):
            return inside
        pixels = np.full((h, w, 3), self.background, np.uint8)
        pixels[: inside.shape[0], : inside.shape[1]] = inside
        return pixels

    @abstractmethod
    def close(self) -> None:
        """Free the file."""

    def native_tiles(self, level: int) -> NativeTiles | None:
        """The level's compressed tiles; None where this reader cannot hand them out."""
        del level
        return None

    def raw_tile(self, level: int, column: int, row: int) -> bytes | None:
        """One native tile as a file of its own (a JPEG with its tables, a JPEG 2000 codestream), not decoded.

        None where the slide declares that it holds no data there. Only for levels with `native_tiles` of these codecs.

        Raises:
            BadTileError: the tile is cut short, or no image of the tile's size.
            SlideError: the slide is gone or broken as a whole.
        """
        raise NotImplementedError(f"{type(self).__name__} has no native tiles at level {level}: {column}, {row}")

    def expect(self, level: int, boxes: Boxes) -> None:
        """Tell which boxes will be read next, in this order, so that their bytes are fetched together and ahead.

        Args:
            level: that all of them are in.
            boxes: (n, 4) x, y, w, h in px of the level.
        """
        del level, boxes  # a reader that fetches nothing ahead need not know

    def forget(self) -> None:
        """Free what is kept of pixels that were read: boxes to come lie elsewhere."""
        return  # most readers keep nothing

    def has_eighths(self, level: int) -> bool:
        """Whether a level can be read at an eighth of its size for less than by `read`."""
        del level
        return False

    def read_eighth(self, level: int, x: int, y: int, w: int, h: int) -> RGB:
        """Pixels (ceil(h / 8), ceil(w / 8), 3) of a box, each the mean of 8 x 8 px to within rounding.

        Args and errors as `read`; x and y are multiples of 8, and w and h where the box does not end with the level.
        Only for levels with `has_eighths`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no eighths of level {level}: {x}, {y}, {w}, {h}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def overview(self, max_px: int) -> Overview:
        """The slide with its longer edge at most `max_px`, area-averaged, read block by block.

        What cannot be decoded at the level that is read is taken from the next finer one that can be.

        Raises:
            SlideError: reason "unreadable", when no block at all can be decoded, at no level.
        """
        number = max((i for i, lv in enumerate(self.levels) if max(lv.width, lv.height) >= max_px), default=0)
        level = self.levels[number]
        factor = max(1, max(level.width, level.height) // max_px)
        if factor >= EIGHTH and self.has_eighths(number):
            factor -= factor % EIGHTH
        rgb = np.full((-(-level.height // factor), -(-level.width // factor), 3), UNREAD, np.uint8)
        unread = np.zeros(rgb.shape[:2], np.bool_)
        pending = list(_blocks(0, 0, unread.shape, _power_of_two(BLOCK_PX // factor)))
        failure = None
        for finer in range(number, -1, -1):
            if pending:
                pending, failure = self._fill(rgb, pending, finer, number, factor)
        for top, left, step in pending:
            unread[top : top + step, left : left + step] = True
        if failure is not None and unread.all():
            raise SlideError("unreadable", f"no part of the slide can be decoded: {failure}") from failure
        share = min(1.0, max_px / max(self.dimensions))
        width, height = (max(1, round(edge * share)) for edge in self.dimensions)
        box = (0.0, 0.0, level.width / factor, level.height / factor)  # the last px may stand for part of a factor
        small = Image.fromarray(rgb).resize((width, height), Image.Resampling.BOX, box)
        lost = Image.fromarray(unread.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BOX, box)
        return Overview(np.asarray(small), np.asarray(lost) > 0, max(self.dimensions) / max(width, height))

    def _fill(
        self, rgb: RGB, blocks: list[Block], number: int, coarse: int, factor: int
    ) -> tuple[list[Block], BadTileError | None]:
        """Read the blocks of an overview (h, w, 3) at a level; those that cannot be decoded, and the last error.

        Args:
            rgb: px of it stand for factor x factor px of the level `coarse`.
            blocks: to read.
            number: of the level to read them at, `coarse` or finer.
            coarse: see `rgb`.
            factor: see `rgb`.
        """
        edge = factor * (self.levels[coarse].downsample / self.levels[number].downsample)  # level px of an overview px
        largest = _power_of_two(int(BLOCK_PX / edge))
        pending = sorted(part for block in blocks for part in _parts(block, rgb, min(block[2], largest)))
        self.expect(number, np.array([_whole(self._level_box(number, edge, block)) for block in pending]))
        pending.reverse()
        failed, failure = [], None
        while pending:
            top, left, step = block = pending.pop()
            target = rgb[top : top + step, left : left + step]
            box = self._level_box(number, edge, block)
            try:
                target[:] = (
                    self._reduced(number, box, factor) if number == coarse else self._resampled(number, box, target)
                )
            except BadTileError as error:
                failure = error
                if step > 1 and step * edge > SMALLEST_PX:
                    pending.extend(_parts(block, rgb, step // 2))
                else:
                    failed.append(block)
        return failed, failure

    def _reduced(self, number: int, box: LevelBox, factor: int) -> RGB:
        """A box, whole px, of a level in small, each px the mean of factor x factor px."""
        if factor % EIGHTH == 0 and self.has_eighths(number):
            pixels, factor = self.read_eighth(number, *_whole(box)), factor // EIGHTH
        else:
            pixels = self.read(number, *_whole(box))
        return np.asarray(Image.fromarray(pixels).reduce(factor)) if factor > 1 else pixels

    def _resampled(self, number: int, box: LevelBox, target: RGB) -> RGB:
        """A box of a level in the size of `target` (h, w, 3), area-averaged."""
        x, y, w, h = _whole(box)
        pixels = Image.fromarray(self.read(number, x, y, w, h))
        inside = (box[0] - x, box[1] - y, box[2] - x, box[3] - y)
        return np.asarray(pixels.resize((target.shape[1], target.shape[0]), Image.Resampling.BOX, inside))

    def _level_box(self, number: int, edge: float, block: Block) -> LevelBox:
        """Where a block of an overview lies in a level of which edge x edge px make one of its px."""
        level, (top, left, step) = self.levels[number], block
        right, bottom = min((left + step) * edge, float(level.width)), min((top + step) * edge, float(level.height))
        return min(left * edge, level.width - 1.0), min(top * edge, level.height - 1.0), right, bottom


def has_shape_of(size: tuple[int, int], whole: tuple[int, int]) -> bool:
    """Whether an image may be all of another one in small: width and height differ by rounding."""
    ratio = size[0] * whole[1] / (size[1] * whole[0])
    return abs(ratio - 1) <= SHAPE + 1 / min(*size, *whole)  # a px, as each halving rounds


def stated_mpp(x: float, y: float) -> Mpp | None:
    """What a file states along x and y, where both are microns that a px can have."""
    return (x, y) if x > 0 and y > 0 and math.isfinite(x * y) else None


def square_mpp(stated: Mpp) -> float | None:
    """The geometric mean of what a file states along x and y; None where its px are not square, but for rounding."""
    return None if max(stated) > min(stated) * (1 + NOT_SQUARE) else math.sqrt(stated[0] * stated[1])


def profile_name(data: bytes | None) -> str | None:
    """What an ICC profile calls itself, "damaged" where that cannot be read; None of none."""
    if not data:
        return None
    try:
        return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(data))).strip()
    except (ImageCms.PyCMSError, OSError):
        return "damaged"


def on_background(rgba: npt.NDArray[np.uint8], background: npt.NDArray[np.uint8]) -> RGB:
    """RGBA (h, w, 4) laid over a colour (3,)."""
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    weight = alpha.astype(np.uint16)
    mixed = rgba[..., :3] * weight + background * (255 - weight)
    return ((mixed + 127) // 255).astype(np.uint8)


def _whole(box: LevelBox) -> tuple[int, int, int, int]:
    """x, y, w, h of the px that a box touches."""
    x, y = int(box[0]), int(box[1])
    return x, y, math.ceil(box[2]) - x, math.ceil(box[3]) - y


def _parts(block: Block, rgb: RGB, step: int) -> Iterator[Block]:
    """The squares of edge `step` that cover what of a block lies in an image (h, w, 3)."""
    top, left, whole = block
    return _blocks(top, left, rgb[top : top + whole, left : left + whole].shape[:2], step)


def _blocks(top: int, left: int, shape: tuple[int, ...], step: int) -> Iterator[Block]:
    """Upper left corners of the squares of edge `step` that cover a box, and the edge."""
    height, width = shape
    return ((y, x, step) for y in range(top, top + height, step) for x in range(left, left + width, step))


def _power_of_two(limit: int) -> int:
    return int(2 ** math.floor(math.log2(max(1, limit))))
