"""A TIFF slide read tile by tile: `tiles` decodes, numpy pastes.

Five times as fast as OpenSlide, whose time goes into compositing, and the same pixels bit for bit: libjpeg's defaults
(accurate DCT, smooth chroma upsampling) on both sides. A tile that cannot be decoded costs what touches it; of JPEG
2000 only damage that is plain to see is found (`damage`).

The overview of a slide without a small level takes each JPEG block's mean, which stands in its data, instead of the
block's 64 px: half the CPU time (the other half is Huffman's code), and the same to within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np

from pipeline.errors import BadTileError
from pipeline.slides.layout import Layout
from pipeline.slides.reader import EIGHTH, RGB, Boxes, NativeTiles, SlideReader
from pipeline.slides.tiles import checked, decoded, eighth
from pipeline.storage.ranges import ByteSource, Range, ReadAhead

CACHE_PX = 2**25  # decoded tiles that are kept: 96 MiB, a row of 512 tiles of 256 px
GLASS = 255  # where the slide declares that it holds no data

Place = tuple[int, int, int]
"""Level, row, column of a tile."""


class TiffReader(SlideReader):
    """Reads the tiles that a box touches, each of them once while boxes come row by row."""

    def __init__(self, source: ByteSource, layout: Layout) -> None:
        self._source = source
        self._pages = layout.pages
        self._bytes = ReadAhead(source)
        self._decoded = _DecodedTiles()
        self._shrunk = _DecodedTiles()
        self.levels = layout.levels
        self.mpp = layout.mpp
        self.vendor = layout.vendor
        self.picked = layout.picked
        self.profile = layout.profile

    @property
    def bytes_read(self) -> int:
        """Of the file, so far."""
        return self._source.bytes_read

    def native_tiles(self, level: int) -> NativeTiles:
        """See `SlideReader.native_tiles`."""
        return self._pages[level].tiles

    def raw_tile(self, level: int, column: int, row: int) -> bytes | None:
        """See `SlideReader.raw_tile`. Damage within the compressed data shows only where it is plain to see."""
        parts = self._tile_bytes(level, column, row)
        try:
            return None if parts is None else checked(self._pages[level], parts[0])
        except ValueError as error:
            raise self._bad(level, column, row, str(error)) from error

    def read(self, level: int, x: int, y: int, w: int, h: int) -> RGB:
        """See `SlideReader.read`."""
        tiles = self._pages[level].tiles
        self._decoded.start(level, y // tiles.height)
        return _pasted((tiles.width, tiles.height), (x, y, w, h), partial(self._tile, level))

    def has_eighths(self, level: int) -> bool:
        """See `SlideReader.has_eighths`: the tiles are JPEGs, whose blocks do not lie across their edges."""
        tiles = self._pages[level].tiles
        return tiles.codec == "jpeg" and tiles.width % EIGHTH == tiles.height % EIGHTH == 0

    def read_eighth(self, level: int, x: int, y: int, w: int, h: int) -> RGB:
        """See `SlideReader.read_eighth`."""
        tiles = self._pages[level].tiles
        self._shrunk.start(level, y // tiles.height)
        edges = (tiles.width // EIGHTH, tiles.height // EIGHTH)
        box = (x // EIGHTH, y // EIGHTH, -(-w // EIGHTH), -(-h // EIGHTH))
        return _pasted(edges, box, partial(self._shrunk_tile, level))

    def expect(self, level: int, boxes: Boxes) -> None:
        """See `SlideReader.expect`."""
        self._bytes.expect(self._spans(level, boxes))

    def close(self) -> None:
        """Free the file and the decoded tiles."""
        self._bytes.close()
        self._source.close()
        self.forget()

    def forget(self) -> None:
        """See `SlideReader.forget`."""
        self._decoded, self._shrunk = _DecodedTiles(), _DecodedTiles()

    def _spans(self, level: int, boxes: Boxes) -> Iterator[Range]:
        """Where the tiles lie that boxes will need, in the order of their first need, less those at hand."""
        page = self._pages[level]
        edges = np.array([page.tiles.width, page.tiles.height])
        first, last = boxes[:, :2] // edges, (boxes[:, :2] + boxes[:, 2:] - 1) // edges
        seen = set()
        for (left, top), (right, bottom) in zip(first.tolist(), last.tolist(), strict=True):
            for row in range(top, bottom + 1):
                for column in range(left, right + 1):
                    for span in self._spans_of(level, column, row):
                        if span not in seen and span[1] and (level, row, column) not in self._decoded:
                            seen.add(span)
                            yield span

    def _spans_of(self, level: int, column: int, row: int) -> list[Range]:
        """Where a tile lies, one span a plane."""
        page = self._pages[level]
        number, tiles = row * page.tiles.columns + column, page.tiles.rows * page.tiles.columns
        at = slice(number, None, tiles)
        return list(zip(page.offsets[at].tolist(), page.lengths[at].tolist(), strict=True))

    def _tile_bytes(self, level: int, column: int, row: int) -> list[bytes] | None:
        """A tile as it stands in the file, one piece a plane; None where there is none."""
        spans = self._spans_of(level, column, row)
        if not any(length for _, length in spans):
            return None
        if any(sum(span) > self._source.size for span in spans):
            raise self._bad(level, column, row, "it reaches beyond the end of the file")
        parts = [self._bytes.get(span) for span in spans]
        if any(len(part) < length or not part for part, (_, length) in zip(parts, spans, strict=True)):
            raise self._bad(level, column, row, "the file ends within it, or a plane of it is absent")
        return parts

    def _tile(self, level: int, column: int, row: int) -> RGB:
        """Pixels of a tile, valid until the next one is asked for."""
        place = (level, row, column)
        found = self._decoded.get(place)
        if found is not None:
            return found
        page = self._pages[level]
        parts = self._tile_bytes(level, column, row)
        if parts is None:
            return _glass(page.tiles.height, page.tiles.width)
        out = self._decoded.free((page.tiles.height, page.tiles.width, 3))
        try:
            pixels = decoded(page, parts, row * page.tiles.columns + column, out)
        except (ValueError, RuntimeError) as error:  # imagecodecs raises the latter
            raise self._bad(level, column, row, str(error)) from error
        self._decoded.add(row, column, pixels)
        return pixels

    def _shrunk_tile(self, level: int, column: int, row: int) -> RGB:
        """An eighth of a tile, valid until the next one is asked for."""
        found = self._shrunk.get((level, row, column))
        if found is not None:
            return found
        page, size = self._pages[level], self.levels[level]
        width, height = page.tiles.width, page.tiles.height
        parts = self._tile_bytes(level, column, row)
        if parts is None:
            return _glass(height // EIGHTH, width // EIGHTH)
        out = self._shrunk.free((height // EIGHTH, width // EIGHTH, 3))
        inside = min(width, size.width - column * width), min(height, size.height - row * height)
        try:
            pixels = eighth(page, parts[0], *inside, out)
        except ValueError as error:
            raise self._bad(level, column, row, str(error)) from error
        self._shrunk.add(row, column, pixels)
        return pixels

    def _bad(self, level: int, column: int, row: int, reason: str) -> BadTileError:
        tiles = self._pages[level].tiles
        place = f"level {level}, tile at x {column * tiles.width}, y {row * tiles.height}"
        return BadTileError("bad-tile", f"{self._source.name}: {place}: {reason}")


class _DecodedTiles:
    """The last decoded tiles of one level, at most CACHE_PX px of them.

    Boxes come row by row, so what lies above the box at hand is not needed again: each tile is decoded once even
    where the cache holds little more than one row of them. The memory goes round, because fresh pages would cost a
    third of a decoding.
    """

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, RGB]] = {}
        self._px = 0
        self._spare: list[RGB] = []
        self._level = 0
        self._top = 0

    def __contains__(self, place: Place) -> bool:
        return self.get(place) is not None

    def get(self, place: Place) -> RGB | None:
        level, row, column = place
        return self._rows.get(row, {}).get(column) if level == self._level else None

    def start(self, level: int, top: int) -> None:
        """A box begins in row `top` of a level."""
        if level != self._level:
            self._rows, self._spare, self._px, self._level = {}, [], 0, level
        elif top > self._top:
            for row in [row for row in self._rows if row < top]:
                self._spare.extend(self._rows.pop(row).values())
        self._top = top

    def free(self, shape: tuple[int, int, int]) -> RGB:
        """Room for a tile, whose content is lost if it is not added."""
        size = shape[0] * shape[1]
        if not self._spare and self._px + size > CACHE_PX and self._rows:
            self._drop()
        if self._spare:
            self._px -= size
            return self._spare.pop()
        return np.empty(shape, np.uint8)

    def add(self, row: int, column: int, tile: RGB) -> None:
        self._rows.setdefault(row, {})[column] = tile
        self._px += tile.shape[0] * tile.shape[1]

    def _drop(self) -> None:
        """Of the uppermost row the tile that came first; of the lowest one where all lie below the box."""
        row = min(self._rows)
        if row > self._top:
            row = max(self._rows)
        tiles = self._rows[row]
        self._spare.append(tiles.pop(next(iter(tiles))))
        if not tiles:
            del self._rows[row]


@cache
def _glass(height: int, width: int) -> RGB:
    return np.full((height, width, 3), GLASS, np.uint8)


def _pasted(edges: tuple[int, int], box: tuple[int, int, int, int], tile: Callable[[int, int], RGB]) -> RGB:
    """A box cut out of tiles.

    Args:
        edges: width and height of a tile.
        box: x, y, w, h.
        tile: column and row to the pixels of a tile, valid until the next call.
    """
    (width, height), (x, y, w, h) = edges, box
    out = np.empty((h, w, 3), np.uint8)
    for row in range(y // height, (y + h - 1) // height + 1):
        top = row * height - y  # where the tile begins in the box; negative above it
        lines, source = slice(max(0, top), top + height), slice(max(0, -top), h - top)
        for column in range(x // width, (x + w - 1) // width + 1):
            left = column * width - x
            out[lines, max(0, left) : left + width] = tile(column, row)[source, max(0, -left) : w - left]
    return out
