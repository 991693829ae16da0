"""Colour jitter of stained tissue, in the space of its stains instead of red, green and blue.

Light that passes stained tissue is dimmed exponentially (Beer-Lambert), so -log(transmitted share) of a pixel is a sum
of its stains' vectors. Ruifrok & Johnston (2001, Analytical and Quantitative Cytology and Histology 23:291-299) give
those of haematoxylin, eosin and DAB; the jitter is that of Tellez et al. (2018, IEEE TMI 37:2126-2136, HED-light and
-strong: strengths 0.05 and 0.2).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical density of haematoxylin, eosin and DAB in red, green and blue (Ruifrok & Johnston 2001, as published)."""

_UNIT = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
_DENSITY = -np.log((np.arange(256) + 1) / 256).astype(np.float32)  # of a value: +1, for black has no finite density


def jittered(pixels: Pixels, scale: Floats, shift: Floats) -> Pixels:
    """Pixels (h, w, 3) whose amount of each stain is multiplied by `scale` (3,) and moved by `shift` (3,).

    With S the stains' unit vectors and d a pixel's optical density, d S^-1 are the amounts, so the new density is
    d (S^-1 diag(scale) S) + shift S: one 3 x 3 product a pixel.
    """
    mix = (np.linalg.inv(_UNIT) * scale) @ _UNIT
    density = _DENSITY[pixels] @ mix.astype(np.float32) + (shift @ _UNIT).astype(np.float32)
    values = np.exp(-density) * np.float32(256) - np.float32(1)
    found: Pixels = np.rint(values.clip(0, 255)).astype(np.uint8)
    return found
