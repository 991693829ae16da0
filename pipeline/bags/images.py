"""Megapixel MNIST (paper section 4.1), generated and never drawn: images that exist as lists of pasted digits.

An image is a black canvas with 28 px pictures pasted on it in order: 50 strokes as noise, then 5 MNIST digits, 3 of
which are alike. `PastedBag` draws the patches it is asked for, bit for bit those that a drawn image would give; what
it holds grows with the pasted pictures, not with the canvas.

The random numbers are those of the official script, make_mnist.py of benbergner/ips (after idiap/attention-sampling):
NumPy's legacy generator, digits first, then places, then noise. So the images are the paper's, whatever made them.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import get_args

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from torch import Tensor

from ips.bag import Chunk
from pipeline.bags.mnist import DIGIT_PX, Subset, idx_files, read_digits
from pipeline.config.base import fingerprint
from pipeline.config.data import MegapixelConfig, TilingConfig
from pipeline.errors import SlideError
from pipeline.storage.files import absolute, source_version

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

SPRITE_PX = DIGIT_PX
TASKS = ("majority", "max", "top", "multi")
"""The columns of labels: class of three digits; greatest; topmost; all that there are, as `1;4;7`."""

_DIGITS, _ALIKE = 5, 3  # on every canvas, and how many of them are the majority
_URI = re.compile(r"(?P<folder>.+)#(?P<subset>train|test)-(?P<number>\d+)")
_THUMBNAIL_PX = 512
_JPEG_QUALITY = 95  # of pictures for people; training never sees them


@dataclass(frozen=True)
class MegapixelMNIST:
    """The description of n images. Places are (row, column) of the upper left px."""

    digits: Ints
    """(n, 5) which MNIST digits; the first 3 are of one class."""
    places: Ints
    """(n, 5, 2); the digits do not overlap."""
    strokes: Floats
    """(p, 28, 28) noise pictures, 0..1."""
    stroke_kinds: Ints
    """(n, p) which of them; they may overlap everything and lie below the digits."""
    stroke_places: Ints
    """(n, p, 2)."""
    classes: Ints
    """(n, 5) of the digits."""

    def labels(self) -> dict[str, Ints]:
        """Task -> (n,) class; `multi` -> (n, 10), 1 for each class that is there."""
        topmost = self.places[:, :, 0].argmin(axis=1)  # the first of equals
        return {
            "majority": self.classes[:, 0],
            "max": self.classes.max(axis=1),
            "top": self.classes[np.arange(len(self.classes)), topmost],
            "multi": (self.classes[:, :, None] == np.arange(10)).any(axis=1).astype(np.int64),
        }


def megapixel_mnist(
    labels: Ints, count: int, *, width: int, height: int, strokes: int, seed: int, subset: Subset
) -> MegapixelMNIST:
    """Describe `count` images from MNIST digits with these labels (m,), each class among them.

    `seed` is the official script's; it draws the training set with `seed + 1`.
    """
    rng = np.random.RandomState(seed + (subset == "train"))
    digits = _draw_digits(rng, labels, count)
    places = np.array([_draw_places(rng, width, height) for _ in range(count)])
    pictures = _draw_strokes(rng, strokes)
    stroke_places = rng.rand(count, strokes, 2) * [height - 2 * SPRITE_PX, width - 2 * SPRITE_PX] + SPRITE_PX
    kinds = rng.rand(count, strokes) * strokes
    return MegapixelMNIST(
        digits, places, pictures, kinds.astype(np.int64), stroke_places.astype(np.int64), labels[digits]
    )


def _draw_digits(rng: np.random.RandomState, labels: Ints, count: int) -> Ints:
    """(count, 5): three of one class, then two of others, with replacement."""
    alike = [np.flatnonzero(labels == digit) for digit in range(10)]
    other = [np.flatnonzero(labels != digit) for digit in range(10)]
    drawn = np.empty((count, _DIGITS), np.int64)
    for row in drawn:
        majority = int(rng.rand() * 10)
        row[:_ALIKE] = rng.choice(alike[majority], _ALIKE)
        row[_ALIKE:] = rng.choice(other[majority], _DIGITS - _ALIKE)
    return drawn


def _draw_places(rng: np.random.RandomState, width: int, height: int) -> list[tuple[int, int]]:
    """Five places, each drawn until it overlaps none before it."""
    places: list[tuple[int, int]] = []
    while len(places) < _DIGITS:
        y, x = rng.rand(2).tolist()
        row, column = round(y * (height - SPRITE_PX)), round(x * (width - SPRITE_PX))
        if all(abs(row - r) >= SPRITE_PX or abs(column - c) >= SPRITE_PX for r, c in places):
            places.append((row, column))
    return places


def _draw_strokes(rng: np.random.RandomState, count: int) -> Floats:
    """(count, 28, 28): two straight lines through a corner each, some mirrored, every px of its own brightness."""
    slopes = np.tan(rng.rand(count) * np.pi / 2.5)
    lines = np.zeros((count, SPRITE_PX, SPRITE_PX), np.bool_)
    for line, slope in zip(lines, slopes, strict=True):
        x = np.linspace(0, min(27.49, 27.49 / slope), 2 * SPRITE_PX)
        line[np.round(x).astype(int), np.round(slope * x).astype(int)] = True
    second = lines.copy()
    rng.shuffle(second)
    for _ in range(2):  # both times the same axis, so that two flips are none: the official script's way
        flipped = rng.rand(count) < 0.33
        second[flipped] = second[flipped, :, ::-1]
    brightness = rng.rand(count, SPRITE_PX, SPRITE_PX) * 0.2 + 0.8
    return ((lines | second) * brightness).astype(np.float32)


@dataclass(frozen=True)
class Grid:
    """The whole patches of an image, row by row: patch n starts at (n // columns, n % columns) * stride."""

    width: int
    height: int
    patch_px: int
    stride_px: int

    @property
    def columns(self) -> int:
        """Patches in a row."""
        return (self.width - self.patch_px) // self.stride_px + 1

    @property
    def rows(self) -> int:
        """Rows of patches."""
        return (self.height - self.patch_px) // self.stride_px + 1

    def touched(self, start: int, patches: int) -> range:
        """Which of `patches` along one axis hold a px of a sprite that starts at `start`."""
        first = -(-(start - self.patch_px + 1) // self.stride_px)
        return range(max(0, first), min(patches, (start + SPRITE_PX - 1) // self.stride_px + 1))


class PastedBag:
    """The patches of one image of pasted sprites, as an `ips` bag of (n, 1, p, p) uint8, drawn when asked for.

    Args:
        sprites: (k, 28, 28), pasted in this order: each covers all 28 x 28 px below it.
        places: (k, 2) row and column of each, wholly on the canvas.
        grid: how the canvas is cut.
    """

    def __init__(self, sprites: Pixels, places: Ints, grid: Grid) -> None:
        self._sprites, self._places, self._grid = sprites, places.tolist(), grid
        self._on: dict[int, list[int]] = {}
        for number, (top, left) in enumerate(self._places):
            for row in grid.touched(top, grid.rows):
                for column in grid.touched(left, grid.columns):
                    self._on.setdefault(row * grid.columns + column, []).append(number)

    def __len__(self) -> int:
        return self._grid.rows * self._grid.columns

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Every row once, in order."""
        for start in range(0, len(self), size):
            yield self.take(torch.arange(start, min(start + size, len(self))))

    def take(self, rows: Tensor) -> Chunk:
        """The patches of `rows` (n,) int64, in that order."""
        edge, columns = self._grid.patch_px, self._grid.columns
        patches = np.zeros((len(rows), edge, edge), np.uint8)  # blank ones cost their bytes and nothing else
        for place, row in enumerate(rows.tolist()):
            for number in self._on.get(row, ()):
                self._paste(patches[place], row, number)
        cells = torch.stack((rows % columns, rows // columns), dim=1).float()
        return Chunk(torch.from_numpy(patches)[:, None], rows, cells)

    def _paste(self, patch: Pixels, row: int, number: int) -> None:
        edge, stride = self._grid.patch_px, self._grid.stride_px
        top = self._places[number][0] - row // self._grid.columns * stride
        left = self._places[number][1] - row % self._grid.columns * stride
        y, x = max(0, top), max(0, left)
        bottom, right = min(edge, top + SPRITE_PX), min(edge, left + SPRITE_PX)
        patch[y:bottom, x:right] = self._sprites[number, y - top : bottom - top, x - left : right - left]


@dataclass(frozen=True)
class Cells:
    """Upper left corners of patches, (n,) each, in px."""

    x: Ints
    y: Ints


@dataclass(frozen=True)
class PastedImage:
    """One image of the set as a `sources.PatchSource`: small and picklable; pixels come into being when asked for."""

    data: MegapixelConfig
    subset: Subset
    number: int
    grid: Grid
    key: str
    n_bad_tiles: int = 0

    @property
    def n_patches(self) -> int:
        """N."""
        return self.grid.rows * self.grid.columns

    @property
    def extent(self) -> float:
        """Edge of a patch, px."""
        return float(self.grid.patch_px)

    @property
    def thumbnail_scale(self) -> float:
        """Px per px of the thumbnail."""
        return float(max(1, -(-max(self.grid.width, self.grid.height) // _THUMBNAIL_PX)))

    @property
    def mpp(self) -> float | None:
        """Microns per level-0 px; None where it is not known."""
        return None

    def bag(self) -> PastedBag:
        """Its patches."""
        return PastedBag(*self._pasted(), self.grid)

    def index(self) -> Cells:
        """Where each patch stands."""
        rows = np.arange(self.n_patches)
        return Cells(rows % self.grid.columns * self.grid.stride_px, rows // self.grid.columns * self.grid.stride_px)

    def payloads(self, rows: Sequence[int] | Ints) -> list[bytes]:
        """Patches as JPEGs."""
        return [_jpeg(patch) for patch in self.bag().take(torch.as_tensor(rows)).patches[:, 0].numpy()]

    def thumbnail(self) -> bytes:
        """A JPEG of at most 512 px: the brightest px of each square."""
        scale = int(self.thumbnail_scale)
        small = np.zeros((-(-self.grid.height // scale), -(-self.grid.width // scale)), np.uint8)
        sprites, places = self._pasted()
        offsets = np.arange(SPRITE_PX)
        for sprite, (top, left) in zip(sprites, places.tolist(), strict=True):
            np.maximum.at(small, ((top + offsets[:, None]) // scale, (left + offsets) // scale), sprite)
        return _jpeg(small)

    def _pasted(self) -> tuple[Pixels, Ints]:
        """(k, 28, 28) sprites and their (k, 2) places, in the order of pasting."""
        images = _generated(self.data, self.subset)
        strokes = _bytes(images.strokes[images.stroke_kinds[self.number]])
        digits = read_digits(self.data.folder, self.subset).images[images.digits[self.number]]
        places = np.concatenate((images.stroke_places[self.number], images.places[self.number]))
        return np.concatenate((strokes, _bytes(digits.astype(np.float32) / 255))), places


def cohort_csv(data: MegapixelConfig) -> bytes:
    """The cohort of both subsets: their ids, URIs (`FOLDER#train-17`), splits and labels.

    Raises:
        StorageError: the MNIST files cannot be read.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("slide_id", "uri", "split", *TASKS))
    for subset in get_args(Subset):
        labels = _generated(data, subset).labels()
        multi = [";".join(map(str, np.flatnonzero(row))) for row in labels.pop("multi")]
        for number, row in enumerate(zip(*labels.values(), multi, strict=True)):
            name = f"{subset}-{number}"
            table.writerow((name, f"{absolute(data.folder)}#{name}", subset, *row))
    return text.getvalue().encode()


def open_image(data: MegapixelConfig, tiling: TilingConfig, uri: str) -> PastedImage:
    """The image of a URI that `cohort_csv` wrote, with the digits where the URI says they are.

    Raises:
        SlideError: the URI names no image of this set.
        StorageError: the MNIST files cannot be read.
    """
    named = _URI.fullmatch(uri)
    if named is None:
        raise SlideError("missing", f"{uri}: not an image of Megapixel MNIST; write FOLDER#train-0 or FOLDER#test-0")
    subset: Subset = "train" if named["subset"] == "train" else "test"
    number, count = int(named["number"]), getattr(data, subset)
    if number >= count:
        raise SlideError("missing", f"{uri}: the set has images {subset}-0 to {subset}-{count - 1}")
    data = data.model_copy(update={"folder": named["folder"]})
    grid = Grid(data.width, data.height, tiling.edge_px, tiling.edge_px - tiling.overlap_px)
    what = data.model_dump(exclude={"folder", "train", "test"})
    digits = read_digits(data.folder, subset).sha256
    return PastedImage(data, subset, number, grid, fingerprint([what, digits, subset, count, number]))


def source_versions(data: MegapixelConfig) -> list[dict[str, object]]:
    """Versions of the four MNIST files.

    Raises:
        StorageError: one cannot be read.
    """
    return [asdict(source_version(uri)) for subset in get_args(Subset) for uri in idx_files(data.folder, subset)]


@lru_cache(maxsize=4)  # 5,000 images take 7 MB and 0.4 s
def _generated(data: MegapixelConfig, subset: Subset) -> MegapixelMNIST:
    count: int = getattr(data, subset)
    return megapixel_mnist(
        read_digits(data.folder, subset).labels,
        count,
        width=data.width,
        height=data.height,
        strokes=data.strokes,
        seed=data.seed,
        subset=subset,
    )


def _bytes(pictures: Floats) -> Pixels:
    """0..1 to 0..255, cut off as the official script does it: not every byte / 255 * 255 comes back."""
    return (255 * pictures).astype(np.uint8)


def _jpeg(grey: Pixels) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(grey[..., None]), _JPEG_QUALITY, colorspace="GRAY"))
