"""One small interface over every kind of slide: OpenSlide's formats, and plain images through Pillow.

Pixels come out as uint8 RGB. Where a slide declares that it holds no data (sparse tiles) the background is
white glass; where data cannot be decoded an error is raised, never white.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import openslide
from PIL import Image, UnidentifiedImageError

from pipeline.errors import BadTileError, SlideError
from pipeline.units import LevelPx, to_level0

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

IMAGE_FORMATS = ("PNG", "JPEG", "TIFF")
MAX_IMAGE_PX = 2**28  # a plain image is decoded whole: 268 MPx are 805 MB of RGB
BLOCK_PX = 1024  # edge of the blocks an overview is read in: 4 MB of RGBA, whatever the slide's size
SMALLEST_PX = 128  # a block that fails is quartered down to this edge, so a bad tile costs about itself
UNREAD = 128  # grey of what an overview could not read: neither glass nor tissue

Image.MAX_IMAGE_PIXELS = None  # the limit is MAX_IMAGE_PX, checked before anything is decoded


@dataclass(frozen=True)
class Level:
    """One level of a slide's pyramid."""

    width: int
    height: int
    downsample: float
    """Level-0 px per px of this level."""


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
    mpp: float | None
    """Microns per level-0 px as the file states it, unchecked; None when it states none."""
    vendor: str

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height in level-0 px."""
        return self.levels[0].width, self.levels[0].height

    @abstractmethod
    def read(self, level: int, x: int, y: int, w: int, h: int) -> RGB:
        """Pixels (h, w, 3) of a box inside a level; x, y, w, h in px of that level.

        Raises:
            BadTileError: the data there cannot be decoded; the reader stays usable.
            SlideError: the slide is gone or broken as a whole.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def overview(self, max_px: int) -> Overview:
        """The slide with its longer edge at most `max_px`, area-averaged, read block by block.

        Raises:
            SlideError: reason "unreadable", when no block at all can be decoded.
        """
        number = max((i for i, lv in enumerate(self.levels) if max(lv.width, lv.height) >= max_px), default=0)
        level = self.levels[number]
        factor = max(1, max(level.width, level.height) // max_px)
        rgb = np.full((-(-level.height // factor), -(-level.width // factor), 3), UNREAD, np.uint8)
        unread = np.zeros(rgb.shape[:2], np.bool_)
        pending = list(_blocks(0, 0, unread.shape, _power_of_two(BLOCK_PX // factor)))
        failure = None
        while pending:
            top, left, step = pending.pop()
            target = (slice(top, top + step), slice(left, left + step))
            try:
                rgb[target] = self._reduced(number, factor, top, left, step)
            except BadTileError as error:
                failure = error
                if step > 1 and step * factor > SMALLEST_PX:
                    pending.extend(_blocks(top, left, unread[target].shape, step // 2))
                else:
                    unread[target] = True
        if failure is not None and unread.all():
            raise SlideError("unreadable", f"no part of the slide can be decoded: {failure}") from failure
        share = min(1.0, max_px / max(self.dimensions))
        width, height = (max(1, round(edge * share)) for edge in self.dimensions)
        box = (0.0, 0.0, level.width / factor, level.height / factor)  # the last px may stand for part of a factor
        small = Image.fromarray(rgb).resize((width, height), Image.Resampling.BOX, box)
        lost = Image.fromarray(unread.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BOX, box)
        return Overview(np.asarray(small), np.asarray(lost) > 0, max(self.dimensions) / max(width, height))

    def _reduced(self, number: int, factor: int, top: int, left: int, step: int) -> RGB:
        """One block of an overview: `step` of its px, each the mean of factor x factor px of the level."""
        level, x, y = self.levels[number], left * factor, top * factor
        pixels = self.read(number, x, y, min(step * factor, level.width - x), min(step * factor, level.height - y))
        return np.asarray(Image.fromarray(pixels).reduce(factor)) if factor > 1 else pixels

    def thumbnail(self, max_px: int) -> RGB:
        """The whole slide (h, w, 3) with its longer edge at most `max_px`."""
        return self.overview(max_px).rgb


class OpenSlideReader(SlideReader):
    """A slide read through OpenSlide."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = self._open()
        properties = self._handle.properties
        self.levels = tuple(
            Level(w, h, downsample)
            for (w, h), downsample in zip(self._handle.level_dimensions, self._handle.level_downsamples, strict=True)
        )
        self.mpp = _mpp(properties)
        self.vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        colour = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        self._background = np.frombuffer(bytes.fromhex(colour), np.uint8)

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self._path)
        except openslide.OpenSlideError as error:
            raise SlideError(
                "unopenable", f"{self._path.name}: OpenSlide refuses it ({error}); re-export the slide"
            ) from error

    def read(self, level: int, x: int, y: int, w: int, h: int) -> RGB:
        """See `SlideReader.read`."""
        downsample = self.levels[level].downsample
        origin = (to_level0(LevelPx(x), downsample), to_level0(LevelPx(y), downsample))
        try:
            rgba = np.asarray(self._handle.read_region(origin, level, (w, h)))
        except openslide.OpenSlideError as error:
            dead, self._handle = self._handle, self._open()  # OpenSlide's errors are terminal for a handle
            dead.close()
            raise BadTileError(
                "bad-tile", f"{self._path.name}: level {level}, x {x}, y {y}, {w} x {h} px: {error}"
            ) from error
        return _on_background(rgba, self._background)

    def close(self) -> None:
        """Free the handle and its cache."""
        self._handle.close()


class ImageReader(SlideReader):
    """A plain image, decoded whole: one level, no mpp."""

    def __init__(self, path: Path) -> None:
        self.mpp = None
        try:
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                _check_image(path, image)
                self.vendor = str(image.format).lower()
                self._pixels = _image_rgb(image)
        except UnidentifiedImageError as error:
            raise SlideError(
                "not-a-slide",
                f"{path.name}: neither a slide format that OpenSlide reads nor {', '.join(IMAGE_FORMATS)}",
            ) from error
        except (OSError, SyntaxError) as error:  # Pillow: SyntaxError for a broken PNG
            raise SlideError("unreadable", f"{path.name}: the image cannot be decoded: {error}") from error
        height, width = self._pixels.shape[:2]
        self.levels = (Level(width, height, 1.0),)

    def read(self, level: int, x: int, y: int, w: int, h: int) -> RGB:
        """See `SlideReader.read`; the box is always decodable."""
        return np.ascontiguousarray(self._pixels[y : y + h, x : x + w])

    def close(self) -> None:
        """Free the pixels."""
        del self._pixels


def open_slide(path: Path) -> SlideReader:
    """Open a local slide or plain image.

    Raises:
        SlideError: reasons "missing", "directory", "empty-file", "not-a-slide", "unopenable", "unreadable",
            "too-large" (a plain image over 268 MPx), "pixel-type" (not 8 bits a channel).
    """
    if not path.exists():
        raise SlideError("missing", f"{path}: no such file; correct the cohort's uri")
    if path.is_dir():
        raise SlideError("directory", f"{path}: a directory, not a slide; name the slide's main file")
    if path.stat().st_size == 0:
        raise SlideError("empty-file", f"{path}: zero bytes; copy the slide again")
    reader: Callable[[Path], SlideReader] = OpenSlideReader
    if openslide.OpenSlide.detect_format(path) is None:
        reader = ImageReader
    return reader(path)


def tool_versions() -> dict[str, str]:
    """Versions of what decodes and encodes pixels, for the patch store's record."""
    tools = {name: version(name) for name in ("numpy", "pillow", "simplejpeg")}
    return {**tools, "openslide": openslide.__library_version__}


def _mpp(properties: Mapping[str, str]) -> float | None:
    """Geometric mean of the stated x and y (they differ by rounding on real scanners), or None."""
    try:
        x, y = (float(properties[f"openslide.mpp-{axis}"]) for axis in "xy")
    except (KeyError, ValueError):
        return None
    return math.sqrt(x * y) if x > 0 and y > 0 and math.isfinite(x * y) else None


def _on_background(rgba: npt.NDArray[np.uint8], background: npt.NDArray[np.uint8]) -> RGB:
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    weight = alpha.astype(np.uint16)
    mixed = rgba[..., :3] * weight + background * (255 - weight)
    return ((mixed + 127) // 255).astype(np.uint8)


def _check_image(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PX:
        raise SlideError(
            "too-large",
            f"{path.name}: a plain image of {width} x {height} px is over {MAX_IMAGE_PX} px; convert it to a "
            "tiled pyramid, e.g. `vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg`",
        )
    if image.mode not in {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}:
        raise SlideError(
            "pixel-type", f"{path.name}: pixels of type {image.mode}; convert the image to 8 bits a channel"
        )


def _image_rgb(image: Image.Image) -> RGB:
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        return _on_background(rgba, np.full(3, 255, np.uint8))
    return np.asarray(image.convert("RGB"))


def _blocks(top: int, left: int, shape: tuple[int, ...], step: int) -> Iterator[tuple[int, int, int]]:
    """Upper left corners of the squares of edge `step` that cover a box, and the edge."""
    height, width = shape
    return ((y, x, step) for y in range(top, top + height, step) for x in range(left, left + width, step))


def _power_of_two(limit: int) -> int:
    return int(2 ** math.floor(math.log2(max(1, limit))))
