"""A slide read through OpenSlide: every format, one composited box at a time.

OpenSlide takes the corner of a box in whole level-0 px. At level 0, and where a level is a whole number of times
smaller, boxes lie on the level's own px. Elsewhere (2.002 times, where an odd edge was halved) they lie up to half a
level-0 px off, and OpenSlide blends neighbouring px: single ones differ by up to 16 of 255 from the file's where the
texture is rough. No corner but 0 is a whole number in both planes then, so it cannot be had exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import openslide
from PIL import ImageCms

from pipeline.errors import BadTileError, SlideError
from pipeline.slides.folders import SUFFIX
from pipeline.slides.reader import RGB, Level, Mpp, SlideReader, has_shape_of, on_background, stated_mpp
from pipeline.storage.ranges import system_error
from pipeline.units import Box, LevelPx, to_level0

_TAKES_ALL = frozenset({"aperio", "generic-tiff"})  # formats of which it takes whatever is in tiles for a level

LIBRARY_VERSION: str = openslide.__library_version__


class OpenSlideReader(SlideReader):
    """A slide read through OpenSlide."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = self._open()
        properties = self._handle.properties
        self.vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        levels = [
            Level(w, h, downsample)
            for (w, h), downsample in zip(self._handle.level_dimensions, self._handle.level_downsamples, strict=True)
        ]
        self.levels = tuple(_true_levels(levels) if self.vendor in _TAKES_ALL else levels)
        self.mpp = _mpp(properties)
        self.profile = _profile(self._handle)
        self._bounds = _bounds(properties, self.dimensions)
        colour = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        red, green, blue = bytes.fromhex(colour)
        self.background = red, green, blue

    @property
    def bounds(self) -> Box:
        """See `SlideReader.bounds`; of MRXS and Leica slides a part of a larger canvas."""
        return self._bounds

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self._path)
        except openslide.OpenSlideError as error:
            raise system_error(self._path.name, _cause(self._path, error)) or SlideError(
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
            raise system_error(self._path.name, error) or BadTileError(
                "bad-tile", f"{self._path.name}: level {level}, x {x}, y {y}, {w} x {h} px: {error}"
            ) from error
        return on_background(rgba, np.array(self.background, np.uint8))

    def close(self) -> None:
        """Free the handle and its cache."""
        self._handle.close()


def _mpp(properties: Mapping[str, str]) -> Mpp | None:
    try:
        x, y = (float(properties[f"openslide.mpp-{axis}"]) for axis in "xy")
    except (KeyError, ValueError):
        return None
    return stated_mpp(x, y)


def _profile(handle: openslide.OpenSlide) -> str | None:
    try:
        found = handle.color_profile
        return None if found is None else ImageCms.getProfileDescription(found).strip()
    except (ImageCms.PyCMSError, OSError):
        return "damaged"


def _true_levels(levels: Sequence[Level]) -> Iterator[Level]:
    """Those before the first that is not smaller than the one before, or has another shape than level 0.

    That is another plane or a picture of the glass, which OpenSlide may show in later levels too, where tiles are
    missing.
    """
    first = levels[0]
    yield first
    for finer, level in pairwise(levels):
        alike = has_shape_of((level.width, level.height), (first.width, first.height))
        if not alike or level.width >= finer.width:
            return
        yield level


def _bounds(properties: Mapping[str, str], dimensions: tuple[int, int]) -> Box:
    """As the file states them; all of the slide where it states none, or some that lie beyond it."""
    whole = Box(0, 0, *dimensions)
    try:
        found = Box(*(int(properties[f"openslide.bounds-{name}"]) for name in ("x", "y", "width", "height")))
    except (KeyError, ValueError):
        return whole
    right, bottom = found.left + found.width, found.top + found.height
    inside = min(found.left, found.top) >= 0 and right <= dimensions[0] and bottom <= dimensions[1]
    return found if inside and min(found.width, found.height) > 0 else whole


def _cause(path: Path, error: Exception) -> Exception:
    """What keeps anybody from reading the file's first byte; else OpenSlide's error, which may not name that."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as found:
        return found
    return error


def is_openslide(path: Path) -> bool:
    """Whether OpenSlide takes the file for a slide; says nothing about its content.

    Raises:
        SlideError: "series", a DICOM slide whose name does not say so. OpenSlide would take its other files along, and
            what knows formats by their suffix (identity, copies of a bucket's files) takes those for other slides.
    """
    found = openslide.OpenSlide.detect_format(path)
    if found == "dicom" and not path.name.lower().endswith(SUFFIX):
        raise SlideError(
            "series",
            f"{path.name}: a DICOM slide whose name does not end in {SUFFIX}, by which its files are known for one "
            f"slide; rename all files of its series, as to {path.name}{SUFFIX}",
        )
    return found is not None
