"""The picture of a synthetic slide, drawn in stains: eosin for fibres, haematoxylin for nuclei.

Its cells stand in nests of three kinds: clear cells, dark nuclei, and lesions, whose cells are both. Every slide has
clear cells on 11.5% to 13.5% of its tissue and dark nuclei on as much; a lesion counts for either, so what it holds is
found elsewhere in a slide without lesions, and no mean over the slide tells how many there are. Nests are mixed: of a
lesion's cells some are only clear or only dark, and of the others a few are lesion cells; two nests of every slide are
halfway between. By one law for all slides come lymphoid aggregates, glands, folds and pen, the stain, the nuclear
density and the tissue. Level 0 has 0.5 microns per px.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from pipeline.demo.texture import MARGIN, U8, Rng, clouds, fibres, sprites, wide_clouds

SITES = ("north", "east", "south")  # laboratories; each has its tint
COARSE = 16  # px of a cell of the coarse maps (tissue, density)
NESTS = (0.115, 0.135)  # share of the tissue with clear cells, and with dark nuclei; lesions are both
LESION_MIX = (0.8, 1.0)  # share of a lesion's cells that are clear and dark
BENIGN_MIX = (0.0, 0.1)  # the same of other nests
ATYPICAL, ATYPICAL_MIX = 2, (0.4, 0.6)  # nests of every slide that are neither, so that a model is sometimes in doubt
RADIUS = (46.0, 58.0)  # px, of a nest
CLEAR_CELL = 14.5  # px, radius
LESION_CELL = 16.8  # larger, as its nucleus: within one cell light and dark cancel, and the deviation would tell
SPACING = 33.0  # px between cells of a nest


class Extent(IntEnum):
    """How much of a slide's tissue lesions cover; `SHARES` has the bounds."""

    NONE = 0
    FEW = 1
    MANY = 2


SHARES = {Extent.NONE: (0.0, 0.0), Extent.FEW: (0.035, 0.045), Extent.MANY: (0.09, 0.115)}


@dataclass
class Canvas:
    """A slide while it is drawn."""

    rng: Rng
    eosin: U8  # (h, w)
    haematoxylin: U8  # (h, w)
    room: npt.NDArray[np.bool_]  # coarse cells deep in tissue where no structure stands yet
    tissue_px: int

    def place(self, reach: float) -> tuple[int, int]:
        """Centre (x, y) of a free spot in the tissue, and take it: nothing else comes within `reach` px."""
        rows, columns = np.nonzero(self.room)
        if not len(rows):
            raise RuntimeError("the tissue is full: fewer structures fit than the demo's laws ask for")
        pick = self.rng.integers(len(rows))
        row, column = int(rows[pick]), int(columns[pick])
        cells = math.ceil(2 * reach / COARSE)
        top, left = max(row - cells, 0), max(column - cells, 0)
        window = self.room[top : row + cells + 1, left : column + cells + 1]
        y, x = np.ogrid[top - row : top - row + window.shape[0], left - column : left - column + window.shape[1]]
        window[np.hypot(y, x) * COARSE < 2 * reach] = False
        return column * COARSE + COARSE // 2, row * COARSE + COARSE // 2

    def stamp(self, name: str, x: npt.NDArray[np.int64], y: npt.NDArray[np.int64]) -> None:
        """Put nuclei of a kind at centres x, y; those nearer than MARGIN to the edge are left out."""
        bank = sprites(name)
        height, width = self.haematoxylin.shape
        inside = (x >= MARGIN) & (x < width - MARGIN) & (y >= MARGIN) & (y < height - MARGIN)
        picks = self.rng.integers(len(bank), size=len(x))
        for cx, cy, pick in zip(x[inside].tolist(), y[inside].tolist(), picks[inside].tolist(), strict=True):
            sprite = bank[pick]
            reach = sprite.stain.shape[0] // 2
            below = self.haematoxylin[cy - reach : cy + reach + 1, cx - reach : cx + reach + 1]
            np.copyto(below, sprite.stain, where=sprite.covers)


@dataclass(frozen=True)
class Picture:
    """A drawn slide and the truth about it."""

    rgbx: U8
    """(h, w, 4) level 0; the fourth byte says nothing."""
    tissue_px: int
    lesions: tuple[tuple[int, int, float], ...]
    """(x, y, radius) in px of level 0."""
    aggregates: int
    """Lymphoid aggregates."""

    @property
    def lesion_share(self) -> float:
        """Share of the tissue that lies in lesions."""
        return sum(math.pi * radius**2 for _, _, radius in self.lesions) / self.tissue_px


def draw_slide(seed: tuple[int, ...], extent: int, site: int) -> Picture:
    """A slide of an `Extent` of lesions from laboratory `site`: a pure function of the arguments."""
    rng = np.random.default_rng(seed)
    canvas = _tissue(rng)
    _stroma_nuclei(canvas)
    aggregates = _lookalikes(canvas)
    lesions = _nests(canvas, Extent(extent))
    image = _stained(canvas, site)
    _pen(rng, image)
    return Picture(image, canvas.tissue_px, lesions, aggregates)


def _tissue(rng: Rng) -> Canvas:
    """Two to four ragged pieces on 28% to 34% of the glass, filled with two kinds of fibres."""
    width = int(1300 * (2.0 ** rng.uniform()))
    height = int(rng.uniform(3.2e6, 4.2e6) / width)
    if rng.uniform() < 0.5:
        width, height = height, width
    rows, columns = math.ceil(height / COARSE), math.ceil(width / COARSE)
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    field = np.full((rows, columns), -9.0, np.float32)
    for piece in range(rng.integers(2, 5)):
        del piece
        cx, cy = rng.uniform(0.2, 0.8) * columns, rng.uniform(0.2, 0.8) * rows
        rx, ry = rng.uniform(0.12, 0.25) * columns, rng.uniform(0.12, 0.25) * rows
        field = np.maximum(field, 1 - np.hypot((x - cx) / rx, (y - cy) / ry))
    field += (_tiled(rng, clouds(60), (rows, columns)).astype(np.float32) - 128) / 220
    border = np.minimum(np.minimum(x, columns - 1 - x), np.minimum(y, rows - 1 - y))
    field -= 0.9 * np.clip(1 - border / 24, 0, 1)  # pieces end before the slide does
    field[border < 4] = -9
    field -= np.quantile(field, 1 - rng.uniform(0.28, 0.34))
    soft = Image.fromarray(np.clip(128 + 900 * field, 0, 255).astype(np.uint8))
    shape = (height, width)
    edge = np.asarray(soft.resize((columns * COARSE, rows * COARSE), Image.Resampling.BILINEAR))[:height, :width]
    first, second = _tiled(rng, fibres(0), shape), _tiled(rng, fibres(1), shape)
    ragged = _tiled(rng, clouds(6), shape) >> 1
    alpha = (edge.astype(np.int16) + ragged > 128 + 64).astype(np.uint8)
    share = _tiled(rng, wide_clouds(), shape).astype(np.uint16)
    mixed = (first * share + second * (255 - share)) >> 8
    tone = np.arange(256) * rng.uniform(0.2, 0.7) + rng.uniform(20, 90)
    eosin = tone.clip(0, 255).astype(np.uint8)[mixed] * alpha
    tone = np.arange(256) * rng.uniform(0.0, 0.22)
    haze = tone.astype(np.uint8)[_tiled(rng, clouds(60), shape)] * alpha
    deep = _shrunk(alpha[COARSE // 2 :: COARSE, COARSE // 2 :: COARSE] > 0, cells=3)
    return Canvas(rng, eosin, haze, deep, int(np.count_nonzero(alpha)))


def _shrunk(mask: npt.NDArray[np.bool_], cells: int) -> npt.NDArray[np.bool_]:
    """The cells of the mask that are at least `cells` from its edge."""
    for axis in (0, 1):
        mask = np.logical_and.reduce([np.roll(mask, step, axis) for step in range(-cells, cells + 1)])
    return mask


def _tiled(rng: Rng, texture: U8, shape: tuple[int, int]) -> U8:
    """The texture repeated over `shape` from a random offset."""
    offset = rng.integers(texture.shape[0], size=2)
    rolled = np.roll(texture, tuple(offset), (0, 1))
    repeats = (math.ceil(shape[0] / texture.shape[0]), math.ceil(shape[1] / texture.shape[1]))
    return np.tile(rolled, repeats)[: shape[0], : shape[1]]


def _stroma_nuclei(canvas: Canvas) -> None:
    """Spindle nuclei all over the tissue (500 to 2,200 per mm2), a few lymphocytes and large pale nuclei between."""
    rng = canvas.rng
    coarse = canvas.eosin[COARSE // 2 :: COARSE, COARSE // 2 :: COARSE] > 0
    density = _tiled(rng, clouds(60), coarse.shape).astype(np.float64) * coarse
    cells = np.flatnonzero(coarse)
    odds = density.ravel()[cells] / density.sum()
    mm2 = canvas.tissue_px * 0.25e-6
    for name, per_mm2 in (
        ("stroma", rng.uniform(500, 2200)),
        ("lymphocyte", rng.uniform(20, 200)),
        ("pale", rng.uniform(5, 40)),
    ):
        picks = rng.choice(cells, int(per_mm2 * mm2), p=odds)
        jitter = rng.integers(0, COARSE, (2, len(picks)))
        row, column = np.divmod(picks, coarse.shape[1])
        canvas.stamp(name, column * COARSE + jitter[0], row * COARSE + jitter[1])


def _nests(canvas: Canvas, extent: Extent) -> tuple[tuple[int, int, float], ...]:
    """Lesions, nests of clear cells and nests of dark nuclei, all of one radius; (x, y, radius) of each lesion."""
    rng = canvas.rng
    radius = rng.uniform(*RADIUS)
    share = math.pi * radius**2 / canvas.tissue_px  # of the tissue, on one nest
    each = round(rng.uniform(*NESTS) / share)  # nests with clear cells, and as many with dark nuclei
    lesions = round(rng.uniform(*SHARES[extent]) / share)
    found = []
    for _ in range(lesions):
        x, y = canvas.place(radius)
        _nest(canvas, (x, y), radius, rng.uniform(*LESION_MIX), share=0.5)
        found.append((x, y, radius))
    for number in range(2 * (each - lesions)):
        mix = ATYPICAL_MIX if number < ATYPICAL else BENIGN_MIX
        _nest(canvas, canvas.place(radius), radius, rng.uniform(*mix), share=number % 2)
    return tuple(found)


def _nest(canvas: Canvas, centre: tuple[int, int], radius: float, mix: float, share: float) -> None:
    """Cells in a ragged disc: of them `mix` are clear and dark, and of the others `share` are clear, the rest dark."""
    x, y = _lattice(canvas.rng, centre, radius, SPACING)
    both = canvas.rng.uniform(size=len(x)) < mix
    first = canvas.rng.uniform(size=len(x)) < share
    clear, dark = first & ~both, ~first & ~both
    _clear(canvas, x[both], y[both], LESION_CELL)
    canvas.stamp("lesion", x[both], y[both])
    _clear(canvas, x[clear], y[clear], CLEAR_CELL)
    canvas.stamp("dark", x[dark], y[dark])


def _lookalikes(canvas: Canvas) -> int:
    """Aggregates, crowds of regular nuclei, glands and folds, by one law; returns the number of aggregates."""
    rng = canvas.rng
    aggregates, crowds = rng.integers(0, 3), rng.integers(0, 2)
    for name, count, spacing in (("lymphocyte", aggregates, 13.0), ("gland", crowds, 15.5)):
        for _ in range(count):
            radius = rng.uniform(35, 55)
            _crowd(canvas, name, canvas.place(radius), radius, spacing)
    for _ in range(rng.integers(0, 3)):
        _gland(canvas, int(rng.integers(35, 60)))
    for _ in range(rng.integers(0, 2)):
        _fold(canvas)
    return int(aggregates)


def _clear(canvas: Canvas, x: npt.NDArray[np.int64], y: npt.NDArray[np.int64], outer: float) -> None:
    """Rings of clear cytoplasm, `outer` px in radius, around x, y; what they surround stays."""
    v, u = np.mgrid[-16:17, -16:17]
    distance = np.hypot(u, v)
    ring = (distance > 9.5) & (distance < outer)
    height, width = canvas.eosin.shape
    for cx, cy in zip(x.tolist(), y.tolist(), strict=True):
        if MARGIN <= cx < width - MARGIN and MARGIN <= cy < height - MARGIN:
            for field in (canvas.eosin, canvas.haematoxylin):
                field[cy - 16 : cy + 17, cx - 16 : cx + 17][ring] //= 8


def _crowd(canvas: Canvas, name: str, centre: tuple[int, int], radius: float, spacing: float) -> None:
    """Nuclei on a jittered hexagonal lattice within a ragged disc."""
    x, y = _lattice(canvas.rng, centre, radius, spacing)
    canvas.stamp(name, x, y)


def _lattice(
    rng: Rng, centre: tuple[int, int], radius: float, spacing: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Points of a jittered hexagonal lattice within a ragged disc, in random order."""
    cx, cy = centre
    count = math.ceil(radius / spacing) + 1
    rows, columns = np.mgrid[-count : count + 1, -count : count + 1].astype(np.float64)
    x = (columns + 0.5 * (rows % 2)) * spacing + rng.normal(0, spacing * 0.12, rows.shape)
    y = rows * spacing * 0.87 + rng.normal(0, spacing * 0.12, rows.shape)
    waves = rng.normal(0, 0.07, 3)[:, None, None] * np.cos(
        np.arange(2, 5)[:, None, None] * np.arctan2(y, x) + rng.uniform(0, 7, 3)[:, None, None]
    )
    inside = np.hypot(x, y) < radius * (1 + waves.sum(0))
    order = rng.permutation(int(inside.sum()))
    return (cx + x[inside][order]).astype(np.int64), (cy + y[inside][order]).astype(np.int64)


def _gland(canvas: Canvas, radius: int) -> None:
    """A ring of regular nuclei around an empty lumen."""
    rng = canvas.rng
    cx, cy = canvas.place(radius)
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    squash = rng.uniform(0.7, 1.0)
    lumen = np.hypot(x, y / squash) < radius - 26
    for field in (canvas.eosin, canvas.haematoxylin):
        field[cy - radius : cy + radius + 1, cx - radius : cx + radius + 1][lumen] = 0
    angles = np.arange(0, 2 * math.pi, 17 / radius)
    reach = radius - 10 + rng.normal(0, 1.5, len(angles))
    canvas.stamp(
        "gland",
        (cx + reach * np.cos(angles)).astype(np.int64),
        (cy + squash * reach * np.sin(angles)).astype(np.int64),
    )


def _fold(canvas: Canvas) -> None:
    """A dark crease: the tissue lies double along a bent line."""
    rng = canvas.rng
    height, width = canvas.eosin.shape
    x, y = canvas.place(24)
    turn, length = rng.uniform(0, math.pi), rng.uniform(150, 450)
    dx, dy = length * math.cos(turn), length * math.sin(turn)
    left, top = int(max(x - abs(dx) - 40, 0)), int(max(y - abs(dy) - 40, 0))
    right, bottom = int(min(x + abs(dx) + 40, width)), int(min(y + abs(dy) + 40, height))
    mask = Image.new("L", (right - left, bottom - top))
    soft = ImageFilter.GaussianBlur(rng.uniform(3, 7))
    bend = rng.uniform(-30, 30, 2)
    line = [(x - dx - left, y - dy - top), (x + bend[0] - left, y + bend[1] - top), (x + dx - left, y + dy - top)]
    ImageDraw.Draw(mask).line(line, fill=255, width=int(rng.integers(12, 30)), joint="curve")
    crease = np.asarray(mask.filter(soft)).astype(np.uint16)
    for field in (canvas.eosin, canvas.haematoxylin):
        window = field[top:bottom, left:right]
        window[:] = np.minimum(window + (window * crease >> 8), 255)


def _stained(canvas: Canvas, site: int) -> U8:
    """Beer-Lambert: RGB = white * 10^-(stains), by one look-up for each pair (eosin, haematoxylin)."""
    rng = canvas.rng
    tint = np.random.default_rng((104, site)).normal(0, 0.03, (2, 3))
    vectors = np.array([[0.10, 0.85, 0.30], [0.72, 0.68, 0.28]]) + tint + rng.normal(0, 0.03, (2, 3))
    vectors = np.clip(vectors, 0.02, None)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    strength = np.array([0.75, 1.3]) * np.exp(rng.normal(0, 0.13, 2))
    white = rng.uniform(236, 248) + rng.uniform(-3, 3, 3)
    levels = np.arange(256) / 255
    density = (strength * levels[:, None]).T[:, :, None] * vectors[:, None, :]  # stain, amount, channel
    table = np.zeros((256, 256, 4), np.uint8)
    table[..., :3] = white * 10 ** -(density[0][:, None] + density[1][None])
    canvas.haematoxylin[canvas.eosin == 0] = 0  # a nucleus ends where its tissue ends
    pairs = canvas.eosin.astype(np.uint16) << 8 | canvas.haematoxylin
    packed = np.take(table.view(np.uint32).ravel(), pairs)
    rgbx: U8 = packed.view(np.uint8).reshape(*pairs.shape, 4)
    return rgbx


def _pen(rng: Rng, image: U8) -> None:
    """A pathologist's pen stroke, on one slide in four."""
    if rng.uniform() > 0.25:
        return
    height, width = image.shape[:2]
    colour = ((20, 60, 140), (15, 100, 60), (25, 25, 30))[rng.integers(3)]
    x, y = rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.9) * height
    turn = rng.uniform(0, 2 * math.pi, 3)
    steps = np.cumsum(rng.uniform(100, 260) * np.stack([np.cos(turn), np.sin(turn)], 1), axis=0)
    left, top = int(np.clip(x - 400, 0, width - 800)), int(np.clip(y - 400, 0, height - 800))
    mask = Image.new("L", (800, 800))
    points = [(x - left, y - top)] + [(x - left + dx, y - top + dy) for dx, dy in steps.tolist()]
    ImageDraw.Draw(mask).line(points, fill=200, width=int(rng.integers(18, 36)), joint="curve")
    ink = np.asarray(mask).astype(np.float32)[..., None] / 255
    window = image[top : top + 800, left : left + 800, :3]
    window[:] = (window * (1 - ink) + np.array(colour, np.float32) * ink).astype(np.uint8)
