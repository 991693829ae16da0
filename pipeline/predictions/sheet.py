"""The contact sheet: the most and the least attended patches of a slide side by side, as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import simplejpeg
from PIL import Image, ImageDraw

from pipeline.inference.figures import photograph_bytes, typeface
from pipeline.inference.heatmap import wrapped

EACH = 12
"""Patches of either kind at most."""
_COLUMNS, _PX, _GAP, _LINE = 6, 160, 10, 18
_LETTERS = 12  # px
_INK, _SOFT, _WHITE = (28, 39, 51), (91, 107, 122), (255, 255, 255)


@dataclass(frozen=True)
class Shown:
    """A patch on the sheet."""

    jpeg: bytes
    label: str


def sheet_png(heading: Sequence[str], groups: Sequence[tuple[str, Sequence[Shown]]]) -> bytes:
    """A PNG; equal arguments give equal bytes.

    Args:
        heading: lines above all, broken where they are wider than the sheet.
        groups: a title, and its patches in rows of six.
    """
    width = _COLUMNS * (_PX + _GAP) + _GAP
    lines = wrapped(heading, width - 2 * _GAP, _LETTERS)
    rows = sum(-(-len(patches) // _COLUMNS) for _, patches in groups)
    height = _GAP + _LINE * len(lines) + len(groups) * (_GAP + _LINE) + rows * (_PX + _LINE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), _WHITE)
    pen, font = ImageDraw.Draw(sheet), typeface(_LETTERS)
    y = _GAP
    for line in lines:
        pen.text((_GAP, y), line, _SOFT, font)
        y += _LINE
    for title, patches in groups:
        y += _GAP
        pen.text((_GAP, y), title, _INK, font)
        y += _LINE
        for number, one in enumerate(patches):
            row, column = divmod(number, _COLUMNS)
            left, top = _GAP + column * (_PX + _GAP), y + row * (_PX + _LINE + _GAP)
            pixels = simplejpeg.decode_jpeg(one.jpeg, "RGB", min_height=_PX, min_width=_PX)  # by eighths
            sheet.paste(Image.fromarray(pixels).resize((_PX, _PX), Image.Resampling.BICUBIC), (left, top))
            pen.text((left, top + _PX + 1), one.label, _INK, font)
        y += -(-len(patches) // _COLUMNS) * (_PX + _LINE + _GAP)
    return photograph_bytes(sheet)
