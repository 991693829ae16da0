"""One tile of a slide as a browser takes it: the file's own JPEG where it can be, else read, made smaller, encoded."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw

from pipeline.errors import BadTileError
from pipeline.slides.reader import EIGHTH, RGB, UNREAD, SlideReader
from pipeline.view.pyramid import Step

QUALITY = 90  # with colours at full resolution: a nucleus' edge keeps its own
JPEG, PNG = "image/jpeg", "image/png"


@dataclass(frozen=True)
class Picture:
    """An encoded picture, and what it is."""

    data: bytes
    media: str
    lasting: bool = True
    """Whether asking again would give the same."""


def tile(reader: SlideReader, step: Step, column: int, row: int) -> Picture:
    """A tile; one that cannot be decoded is grey with a cross, so that damage is seen and the rest is shown.

    A tile of the file that reaches over the slide's edge is handed out whole: the browser cuts it (`Step.box`).

    Raises:
        IndexError: there is no such tile.
        SlideError: the slide is gone or broken as a whole.
    """
    x, y, width, height = step.box(column, row)
    try:
        if step.raw:
            data = reader.raw_tile(step.level, column, row)
            return Picture(data, JPEG) if data is not None else _glass(width, height, reader.background)
        return Picture(_jpeg(_pixels(reader, step, x, y, width, height)), JPEG)
    except BadTileError:
        return _damaged(width, height)


def _pixels(reader: SlideReader, step: Step, x: int, y: int, width: int, height: int) -> RGB:
    """A box of a step (height, width, 3); px at the lower and right edge are means of what of them is on the slide."""
    level, factor = reader.levels[step.level], step.factor
    left, top = x * factor, y * factor
    box = left, top, min(width * factor, level.width - left), min(height * factor, level.height - top)
    try:
        if factor % EIGHTH == 0 and reader.has_eighths(step.level):
            pixels, factor = reader.read_eighth(step.level, *box), factor // EIGHTH
        else:
            pixels = reader.read(step.level, *box)
    finally:
        reader.forget()
    return pixels if factor == 1 else np.asarray(Image.fromarray(pixels).reduce(factor))


def _jpeg(pixels: RGB) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, colorsubsampling="444"))


@lru_cache(maxsize=32)
def _glass(width: int, height: int, colour: tuple[int, int, int]) -> Picture:
    return Picture(_png(Image.new("RGB", (width, height), colour)), PNG)


@lru_cache(maxsize=32)
def _damaged(width: int, height: int) -> Picture:
    image = Image.new("RGB", (width, height), (UNREAD,) * 3)
    draw = ImageDraw.Draw(image)
    draw.line((0, 0, width, height), fill=(90, 90, 90), width=2)
    draw.line((0, height, width, 0), fill=(90, 90, 90), width=2)
    return Picture(_png(image), PNG, lasting=False)


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
