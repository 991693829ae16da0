"""The coordinate planes of a slide, and the conversions between them.

`Level0Px`: pixels of the slide's full resolution. `LevelPx`: pixels of one pyramid level.
`PatchPx`: pixels of a patch as the network sees it.
"""

from __future__ import annotations

from typing import NamedTuple, NewType

Level0Px = NewType("Level0Px", int)
LevelPx = NewType("LevelPx", int)
PatchPx = NewType("PatchPx", int)


class Box(NamedTuple):
    """A rectangle, in level-0 px."""

    left: int
    top: int
    width: int
    height: int


def to_level0(px: LevelPx, downsample: float) -> Level0Px:
    """A length in pixels of a level, in full-resolution pixels (downsample = level-0 px per level px)."""
    return Level0Px(round(px * downsample))
