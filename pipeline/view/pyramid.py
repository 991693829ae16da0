"""How a slide is offered to a browser: steps from coarse to fine, each cut into tiles.

A step is a level of the slide as it stands in the file where there is one, else a finer level made smaller by a whole
number. So tiles of the file can go out as they are, and every step's px lie on whole px of the level that it is of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.slides.reader import Level, NativeTiles

EDGE = 512  # px of a tile that is made: four requests fill a window at first
COARSE_EDGE = 256  # where a tile is made of so much that a larger one would be waited for
MANY = 8  # level px a tile's px is made of, along one edge: beyond it tiles are `COARSE_EDGE`
MOST = 32  # 8192 px square of a level are read for one tile then, some 0.3 s
SMALLEST = 512  # px of the coarsest step's longer edge: one tile
GAP = 3.0  # steps further apart than that get one between: a browser would load 9 times the px that it shows
RAW = range(128, 1025)  # px of native tiles that are handed out: smaller are too many, larger too slow to wait for


@dataclass(frozen=True)
class Step:
    """One resolution of the slide."""

    downsample: float
    """Level-0 px per px, as patches are placed by it: what a model saw lies under its number."""
    width: int
    height: int
    tile_width: int
    tile_height: int
    level: int
    """Number of the slide's level that it is made of."""
    factor: int
    """Px of that level per px, along each edge."""
    raw: bool
    """Its tiles are those of the file."""

    @property
    def columns(self) -> int:
        """Tiles from left to right."""
        return -(-self.width // self.tile_width)

    @property
    def rows(self) -> int:
        """Tiles from top to bottom."""
        return -(-self.height // self.tile_height)

    def box(self, column: int, row: int) -> tuple[int, int, int, int]:
        """Left, top, width and height of what of a tile lies on the slide, px of the step.

        Raises:
            IndexError: there is no such tile.
        """
        if not (0 <= column < self.columns and 0 <= row < self.rows):
            raise IndexError(f"no tile {column}, {row} of {self.columns} x {self.rows}")
        x, y = column * self.tile_width, row * self.tile_height
        return x, y, min(self.tile_width, self.width - x), min(self.tile_height, self.height - y)


def steps(levels: Sequence[Level], tiles: Sequence[NativeTiles | None]) -> tuple[Step, ...]:
    """The steps of a slide, the coarsest first; the last one is level 0.

    Args:
        levels: the slide's, the largest first.
        tiles: of each level, where they can be handed out.
    """
    return tuple(reversed(list(_from_fine(levels, tiles))))


def plain_steps(width: int, height: int) -> tuple[Step, ...]:
    """Steps of powers of two, for what is drawn and not read (layers); from coarse to fine."""
    count = max(0, math.ceil(math.log2(max(width, height, SMALLEST) / SMALLEST)))
    return tuple(_step(Level(width, height, 1.0), 0, 2**power, EDGE) for power in range(count, -1, -1))


def _from_fine(levels: Sequence[Level], tiles: Sequence[NativeTiles | None]) -> Iterator[Step]:
    for number, (level, coarser) in enumerate(pairwise([*levels, None])):
        assert level is not None
        yield _native(level, number, tiles[number])
        for factor in _factors(level, coarser):
            yield _step(level, number, factor, EDGE if factor <= MANY else COARSE_EDGE)


def _factors(level: Level, coarser: Level | None) -> Iterator[int]:
    """By how much a level is made smaller: until the next one is near, or else until one tile holds it."""
    factor = 2
    while factor <= MOST:
        if coarser is not None and coarser.downsample / (level.downsample * factor / 2) <= GAP:
            return
        if coarser is None and max(level.width, level.height) * 2 <= SMALLEST * factor:
            return
        yield factor
        factor *= 2


def _native(level: Level, number: int, tiles: NativeTiles | None) -> Step:
    if tiles is None or tiles.codec != "jpeg" or not (tiles.width in RAW and tiles.height in RAW):
        return _step(level, number, 1, EDGE)
    return Step(level.downsample, level.width, level.height, tiles.width, tiles.height, number, 1, raw=True)


def _step(level: Level, number: int, factor: int, edge: int) -> Step:
    width, height = -(-level.width // factor), -(-level.height // factor)
    return Step(level.downsample * factor, width, height, edge, edge, number, factor, raw=False)
