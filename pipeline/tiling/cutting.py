"""One patch of an open slide as a JPEG: the slide's own tile where the patch is exactly one, else encoded anew.

With `tiling.context_mpp` a second one follows, of what lies around: as many px, coarser, with the same centre. It is
what HookNet (van Rijthoven et al. 2021, arXiv 2006.12230) and multi-scale MIL (Li et al. 2021, arXiv 2011.08939) give a
network beside a patch. The two are one value, so that both are one range read, and whoever decodes it as a JPEG sees
the patch, because a JPEG ends with a mark of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.config.base import fingerprint
from pipeline.config.data import TilingConfig
from pipeline.errors import BadTileError
from pipeline.slides.open import tool_versions
from pipeline.slides.reader import RGB, Boxes, NativeTiles, SlideReader
from pipeline.telemetry import Laps
from pipeline.tiling.grid import Cells, Grid, choose_near

AHEAD_PX = 2**26  # of patches that are held until their surroundings are read too, as many as a part of the store has
PAYLOAD = 2  # of this code: raised when it gives other bytes for a patch, be it by decoding, resizing or encoding
_START = b"\xff\xd8"


class Cutter:
    """Cuts the patches of one slide out of one level.

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
        self._around = Surroundings.of(reader, grid, spec)

    def each(self, origins: Cells) -> Iterator[bytes | BadTileError]:
        """The patches whose upper left corners (n, 2) are these, in px of the level, each followed by its surroundings.

        Or the error, where a patch cannot be decoded, or its surroundings cannot. These are asked for after many
        patches, not in turn, for readers keep the tiles of one level.

        Raises:
            SlideError: the slide is gone or broken as a whole.
        """
        with self._laps:
            if self._around is None:
                self._expect(origins)
                yield from (_tried(self._patch, x, y) for x, y in origins.tolist())
            else:
                yield from self._with_surroundings(origins, self._around)

    def _with_surroundings(self, origins: Cells, around: Surroundings) -> Iterator[bytes | BadTileError]:
        around_jpeg = partial(self._encoded, around.read)
        step = max(1, AHEAD_PX // int(self._grid.patch_px) ** 2)
        for some in (origins[first : first + step] for first in range(0, len(origins), step)):
            self._expect(some)
            own = [_tried(self._patch, x, y) for x, y in some.tolist()]
            around.expect(some)
            for (x, y), image in zip(some.tolist(), own, strict=True):
                if isinstance(image, BadTileError):
                    yield image
                    continue
                more = _tried(around_jpeg, x, y)
                yield more if isinstance(more, BadTileError) else image + more

    def _expect(self, origins: Cells) -> None:
        level = self._reader.levels[self._grid.level]
        size = np.minimum(self._grid.read_px, np.array([level.width, level.height]) - origins)
        self._reader.expect(self._grid.level, np.concatenate([origins, size], axis=1))

    def _patch(self, x: int, y: int) -> bytes:
        original = self._original(x, y)
        return self._encoded(self._read, x, y) if original is None else original

    def _read(self, x: int, y: int) -> RGB:
        edge = self._grid.read_px
        return self._reader.read_over(self._grid.level, x, y, edge, edge)

    def _encoded(self, read: Callable[[int, int], RGB], x: int, y: int) -> bytes:
        self._laps.start()
        rgb = read(x, y)
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


def _tried(cut: Callable[[int, int], bytes], x: int, y: int) -> bytes | BadTileError:
    try:
        return cut(x, y)
    except BadTileError as error:
        return error


class Surroundings:
    """Reads what lies around the patches of one slide, out of one level.

    Args:
        reader: the open slide.
        grid: of the patches.
        times: how much coarser than a patch, `tiling.context_mpp / tiling.mpp`.
        tolerance: a level that is within this share of it is read as it is, as for patches.
    """

    def __init__(self, reader: SlideReader, grid: Grid, times: float, tolerance: float) -> None:
        self._reader, self._grid = reader, grid
        self.level, factor = choose_near(reader.levels, grid.scale * times, 1.0, tolerance)
        self.read_px = round(int(grid.patch_px) * factor)
        """Edge of the place, px of `level`."""
        self._downsample = reader.levels[self.level].downsample

    @classmethod
    def of(cls, reader: SlideReader, grid: Grid, spec: TilingConfig) -> Surroundings | None:
        """As the spec asks for them; None where it does not."""
        if spec.context_mpp is None:
            return None
        assert spec.mpp is not None
        return cls(reader, grid, spec.context_mpp / spec.mpp, spec.mpp_tolerance)

    def corners(self, origins: Cells) -> Cells:
        """(n, 2) x, y of the upper left corners, px of `level`, negative before the slide's own.

        `origins` (n, 2) are those of the patches, px of the grid's level.
        """
        centres = (origins + self._grid.read_px / 2) * (self._grid.downsample / self._downsample)
        corners: Cells = np.rint(centres - self.read_px / 2).astype(np.int64)
        return corners

    def expect(self, origins: Cells) -> None:
        """Announce the surroundings of the patches to come."""
        corners = self.corners(origins)
        self._reader.expect(self.level, np.concatenate(self._inside(corners), axis=1))

    def read(self, x: int, y: int) -> RGB:
        """(read_px, read_px, 3) around the patch whose corner is x, y in px of the grid's level.

        What is beyond the slide is background, as in a patch.

        Raises:
            BadTileError, SlideError: as `SlideReader.read`.
        """
        corners = self.corners(np.array([[x, y]], np.int64))
        first, size = self._inside(corners)
        (left, top), (w, h) = first[0].tolist(), size[0].tolist()
        inside = self._reader.read(self.level, left, top, w, h)
        if inside.shape[:2] == (self.read_px, self.read_px):
            return inside
        pixels = np.full((self.read_px, self.read_px, 3), self._reader.background, np.uint8)
        right, lower = (first - corners)[0].tolist()
        pixels[lower : lower + h, right : right + w] = inside
        return pixels

    def _inside(self, corners: Cells) -> tuple[Boxes, Boxes]:
        """(n, 2) x, y and (n, 2) w, h of what lies on the slide: some px of each, since it holds a patch's place."""
        level = self._reader.levels[self.level]
        size = np.array([level.width, level.height])
        first, last = np.clip(corners, 0, size - 1), np.clip(corners + self.read_px, 1, size)
        return first, np.maximum(last - first, 1)


def split(image: bytes) -> tuple[bytes, bytes]:
    """The JPEGs of a patch and of its surroundings, from a value of a store with `tiling.context_mpp`.

    The second begins with the last bytes FF D8: it is encoded without thumbnails, and within a JPEG's data FF is
    followed by 00 or a restart mark alone. ValueError where there is none.
    """
    start = image.rfind(_START)
    if start <= 0:
        raise ValueError("it has no second picture, of its surroundings")
    return image[:start], image[start:]


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
