"""One patch of an open slide as a JPEG: the slide's own tile where the patch is exactly one, else encoded anew."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Self

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.config.base import fingerprint
from pipeline.config.data import TilingConfig
from pipeline.errors import BadTileError
from pipeline.slides.open import tool_versions
from pipeline.slides.reader import RGB, NativeTiles, SlideReader
from pipeline.telemetry import Laps
from pipeline.tiling.grid import Cells, Grid

PAYLOAD = 2  # of this code: raised when it gives other bytes for a patch, be it by decoding, resizing or encoding


class Cutter:
    """Cuts the patches of one slide out of one level; as a block, it tells at its end what that took.

    Args:
        reader: the open slide.
        grid: the level and the size of its patches.
        spec: how to encode.
    """

    def __init__(self, reader: SlideReader, grid: Grid, spec: TilingConfig) -> None:
        self._reader = reader
        self._grid = grid
        self._spec = spec
        self._tiles = None if spec.codec == "encoded" else _matching(reader, grid)
        self._laps = Laps()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._laps.__exit__(*error)

    def expect(self, origins: Cells) -> None:
        """Announce the patches to come, by their upper left corners (n, 2) in px of the level, in this order."""
        level = self._reader.levels[self._grid.level]
        size = np.minimum(self._grid.read_px, np.array([level.width, level.height]) - origins)
        self._reader.expect(self._grid.level, np.concatenate([origins, size], axis=1))

    def cut(self, x: int, y: int) -> bytes:
        """The patch whose upper left corner is x, y in px of the level.

        Raises:
            BadTileError: it cannot be decoded.
            SlideError: the slide is gone or broken as a whole.
        """
        original = self._original(x, y)
        if original is not None:
            return original
        edge = self._grid.read_px
        self._laps.start()
        rgb = self._reader.read_over(self._grid.level, x, y, edge, edge)
        self._laps.lap("decode")
        data = encode(_resized(rgb, int(self._grid.patch_px)), self._spec.jpeg_quality)
        self._laps.lap("encode")
        return data

    def _original(self, x: int, y: int) -> bytes | None:
        """The slide's own JPEG of the patch; None where the patch is not one tile, or there is no data.

        What a tile shows beyond the slide's edge is the scanner's filling, so there its bytes are not the patch's.
        """
        tiles, level = self._tiles, self._reader.levels[self._grid.level]
        if tiles is None or x % tiles.width or y % tiles.height:
            return None
        if x + tiles.width > level.width or y + tiles.height > level.height:
            return None
        column, row = x // tiles.width, y // tiles.height
        data = self._reader.raw_tile(self._grid.level, column, row)
        if data is not None and self._spec.codec == "checked":
            try:
                simplejpeg.decode_jpeg(data)
            except ValueError as error:
                raise BadTileError("bad-tile", f"level {self._grid.level}, x {x}, y {y}: {error}") from error
        return data


def encode(rgb: RGB, quality: int) -> bytes:
    """JPEG, 4:4:4, with libjpeg's accurate DCT."""
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=quality, colorspace="RGB"))


@cache
def codec_fingerprint() -> str:
    """Digest of what decides a patch's bytes beyond the slide and the spec: this code and its libraries.

    A picture that is resized, encoded and decoded tells two builds of libjpeg apart that have one version.
    """
    wave = np.arange(3 * 72 * 56) * 7919 % 251
    picture = (wave.reshape(72, 56, 3) // 2 + np.arange(56)[:, None] * 2).astype(np.uint8)
    found = hashlib.sha256()
    for subsampling in ("444", "422", "420"):
        jpeg = simplejpeg.encode_jpeg(picture, quality=90, colorspace="RGB", colorsubsampling=subsampling)
        decoded = simplejpeg.decode_jpeg(jpeg)
        found.update(jpeg + decoded.tobytes() + _resized(decoded, 31).tobytes())
    return fingerprint({"payload": PAYLOAD, "tools": tool_versions(), "probe": found.hexdigest()})


def _matching(reader: SlideReader, grid: Grid) -> NativeTiles | None:
    """The level's tiles where they are JPEGs of a patch's size, and patches are not resized."""
    tiles = reader.native_tiles(grid.level)
    if tiles is None or tiles.codec != "jpeg":
        return None
    return tiles if {tiles.width, tiles.height, int(grid.read_px)} == {int(grid.patch_px)} else None


def _resized(rgb: RGB, edge: int) -> RGB:
    """Area-averaged to edge x edge px."""
    if len(rgb) == edge:
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((edge, edge), Image.Resampling.BOX))
