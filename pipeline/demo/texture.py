"""What a synthetic slide is made of: tileable clouds and fibres, and nuclei. Drawn once per process, fixed seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Rng = np.random.Generator

TEXTURE = 1024  # edge of the tileable textures, in px
MARGIN = 48  # px at the slide's edge without nuclei, so that no sprite is cut


@dataclass(frozen=True)
class Sprite:
    """One nucleus: haematoxylin (h, w) and where it covers what lies below."""

    stain: U8
    covers: npt.NDArray[np.bool_]


@cache
def clouds(scale: int) -> U8:
    """(TEXTURE, TEXTURE) tileable clouds, features of about `scale` and scale / 4 px."""
    rng = np.random.default_rng((101, scale))
    return _to_bytes(_noise(rng, scale, scale) + 0.5 * _noise(rng, scale / 4, scale / 4), 45.0)


@cache
def wide_clouds() -> U8:
    """(2 * TEXTURE, 2 * TEXTURE) tileable clouds, features of about 120 px."""
    return np.asarray(Image.fromarray(clouds(60)).resize((2 * TEXTURE, 2 * TEXTURE)))


@cache
def fibres(kind: int) -> U8:
    """(TEXTURE, TEXTURE) tileable wavy fibres; kind 0 runs across and is fine, kind 1 runs down and is coarse."""
    rng = np.random.default_rng((102, kind))
    straight = _noise(rng, 26.0, 1.3 + 1.2 * kind) + 0.7 * _noise(rng, 1.0, 1.0)
    shift = (45.0 * _noise(rng, 70.0, 70.0)).astype(np.int64)
    rows, columns = np.mgrid[0:TEXTURE, 0:TEXTURE]
    wavy = straight[(rows + shift) % TEXTURE, columns]
    return _to_bytes(wavy.T if kind else wavy, 48.0)


def _noise(rng: Rng, along: float, across: float) -> F32:
    """Tileable Gaussian noise of unit deviation, smooth over `along` px in x and `across` px in y."""
    spectrum = np.fft.rfft2(rng.standard_normal((TEXTURE, TEXTURE)))
    fy, fx = np.fft.fftfreq(TEXTURE)[:, None], np.fft.rfftfreq(TEXTURE)[None]
    spectrum *= np.exp(-2 * math.pi**2 * ((along * fx) ** 2 + (across * fy) ** 2))
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, (TEXTURE, TEXTURE))
    unit: F32 = (field / field.std()).astype(np.float32)
    return unit


def _to_bytes(field: F32, deviation: float) -> U8:
    levels: U8 = np.clip(128 + deviation * field / field.std(), 0, 255).astype(np.uint8)
    return levels


@dataclass(frozen=True)
class NucleusKind:
    """Shape law of one kind of nucleus; lengths in px of level 0 (0.5 microns)."""

    radius: tuple[float, float]
    stretch: tuple[float, float]
    ragged: float  # relative deviation of the outline
    stain: tuple[float, float]
    coarse: float  # depth of the chromatin's clumps, of 255
    rim: float = 30.0  # how much darker the membrane is


NUCLEI = {
    "stroma": NucleusKind((5.0, 7.0), (1.6, 2.8), 0.05, (120, 185), 18),
    "gland": NucleusKind((7.0, 8.5), (1.0, 1.3), 0.03, (125, 185), 14),
    "lymphocyte": NucleusKind((6.0, 7.2), (1.0, 1.15), 0.03, (200, 240), 12),
    "pale": NucleusKind((13.0, 18.0), (1.0, 1.3), 0.03, (75, 110), 10),
    "dark": NucleusKind((8.0, 10.5), (1.0, 1.4), 0.08, (215, 250), 20),
    "lesion": NucleusKind((9.2, 11.9), (1.0, 1.4), 0.08, (215, 250), 20),
}


@cache
def sprites(name: str) -> tuple[Sprite, ...]:
    """64 nuclei of one kind."""
    kind = NUCLEI[name]
    rng = np.random.default_rng((103, *name.encode()))
    return tuple(_sprite(kind, rng) for _ in range(64))


def _sprite(kind: NucleusKind, rng: Rng) -> Sprite:
    radius, stretch = rng.uniform(*kind.radius), math.sqrt(rng.uniform(*kind.stretch))
    reach = min(math.ceil(radius * stretch * (1 + 2 * kind.ragged)) + 2, MARGIN)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    turn = rng.uniform(0, 2 * math.pi)
    u = (x * math.cos(turn) + y * math.sin(turn)) / stretch
    v = (y * math.cos(turn) - x * math.sin(turn)) * stretch
    angle = np.arctan2(v, u)
    outline = np.ones_like(u)
    for order in range(2, 6):
        outline += kind.ragged * rng.normal() / math.sqrt(order - 1) * np.cos(order * angle + rng.uniform(0, 7))
    depth = radius * outline - np.hypot(u, v)  # px inside the membrane
    clumps = np.asarray(Image.fromarray(rng.standard_normal((9, 9)).astype(np.float32)).resize(x.shape, 3))
    stain = rng.uniform(*kind.stain) + kind.coarse * clumps + np.where(depth < 2.5, kind.rim, 0.0)
    stain *= np.clip(depth + 0.5, 0, 1)
    return Sprite(np.clip(stain, 0, 255).astype(np.uint8), depth > 0)
