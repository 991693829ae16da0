"""What a number looks like: scales that all slides of a batch share, colours that the colour-blind can tell apart.

Attention goes from clear blue over green to yellow (viridis without its purple, which is the stain's own). What has a
sign is blue below zero and vermilion above (Okabe and Ito), and clear at zero. Where a layer says little it is clear:
the tissue is what one looks at.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.view.rasters import Floats, Mask

COLOURS = 255  # and one for nothing
_RISING = ("2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
_BELOW, _ABOVE = "0072b2", "d55e00"
_FAINT, _DENSE = 0.45, 0.80
_SHADE = (28, 39, 51)

Palette = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Scale:
    """From numbers to colours."""

    kind: Literal["rising", "signed"]
    top: float
    """Where the colours end; of a signed one at both sides."""
    unit: str
    """What stands beside the colour bar."""
    stated: str
    """Where `top` comes from."""
    times: bool = False
    """Of a signed one: the numbers are logarithms to base 2."""

    def places(self, values: Floats) -> Palette:
        """Numbers of any shape -> colours 1 to 255. A rising scale is of logarithms, from 1."""
        if self.kind == "rising":
            share = np.log(np.maximum(values, 1.0)) / np.log(self.top)
        else:
            share = values / self.top / 2 + 0.5
        places: Palette = (1 + np.rint(np.clip(share, 0, 1) * (COLOURS - 1))).astype(np.uint8)
        return places

    @cached_property
    def palette(self) -> Palette:
        """(256, 4) RGBA; 0 is clear."""
        share = np.linspace(0, 1, COLOURS)
        if self.kind == "rising":
            colours, density = _between(_RISING, share), _FAINT + (_DENSE - _FAINT) * share
            density[0] = 0  # at or below uniform
        else:
            signed = 2 * share - 1
            colours = np.where(signed[:, None] < 0, _between([_BELOW], share), _between([_ABOVE], share))
            density = _DENSE * np.abs(signed) ** 0.7
        rgba = np.concatenate([colours, 255 * density[:, None]], axis=1)
        return np.concatenate([np.zeros((1, 4)), np.rint(rgba)]).astype(np.uint8)

    def legend(self) -> dict[str, Any]:
        """What the colour bar needs: colours from low to high as CSS, marks with their places (0 to 1), the words."""
        shown = self.palette[np.rint(np.linspace(1, COLOURS, 17)).astype(int)]
        bar = [f"rgba({red}, {green}, {blue}, {alpha / 255:.2f})" for red, green, blue, alpha in shown.tolist()]
        return {"colours": bar, "marks": self._marks(), "unit": self.unit, "stated": self.stated}

    def _marks(self) -> list[dict[str, Any]]:
        if self.kind == "rising":
            steps = [base * 10**power for power in range(7) for base in (1, 2, 5)]
            values: Sequence[float] = [step for step in steps if step <= self.top]
            return [
                {"at": float(np.log(v) / np.log(self.top)), "text": f"{v:g}\N{MULTIPLICATION SIGN}"} for v in values
            ]
        marks = []
        for share in (0, 0.25, 0.5, 0.75, 1):
            value = self.top * (2 * share - 1)
            text = f"{2 ** abs(value):.2g}\N{MULTIPLICATION SIGN}" if self.times else f"{value:+.2g}"
            marks.append({"at": share, "text": text})
        return marks


def coloured(scale: Scale, values: Floats, covered: Mask) -> bytes:
    """Values of a tile (h, w) as a PNG; clear where nothing is."""
    return _indexed(np.where(covered, scale.places(values), 0).astype(np.uint8), scale.palette)


def shaded(outside: Mask) -> bytes:
    """A PNG that darkens part of a tile (h, w): what is not meant is behind a dark glass, what is stays as it is."""
    palette = np.array([(0, 0, 0, 0), (*_SHADE, 150)], np.uint8)
    return _indexed(outside.astype(np.uint8), palette)


def _between(stops: Sequence[str], share: Floats) -> Floats:
    """Colours (n, 3) at places from 0 to 1 of a row of stops."""
    rgb = np.array([list(bytes.fromhex(stop)) for stop in stops], float)
    at = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(share, at, rgb[:, channel]) for channel in range(3)], axis=1)


def _indexed(numbers: Palette, palette: Palette) -> bytes:
    image = Image.fromarray(numbers)
    image.putpalette(palette[:, :3].tobytes(), "RGB")
    out = io.BytesIO()
    image.save(out, "PNG", transparency=palette[:, 3].tobytes(), compress_level=1)
    return out.getvalue()
