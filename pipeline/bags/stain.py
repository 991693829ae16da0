"""Colour jitter of stained tissue, in the space of its stains instead of red, green and blue.

Light that passes stained tissue is dimmed exponentially (Beer-Lambert), so -log(transmitted share) of a pixel is a sum
of its stains' vectors. Ruifrok & Johnston (2001, Analytical and Quantitative Cytology and Histology 23:291-299) give
those of haematoxylin, eosin and DAB; the jitter is that of Tellez et al. (2018, IEEE TMI 37:2126-2136, HED-light and
-strong: strengths 0.05 and 0.2).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical density of haematoxylin, eosin and DAB in red, green and blue (Ruifrok & Johnston 2001, as published)."""

_UNIT = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
_ON_DEVICE = 16  # patches changed together on a GPU: 12 MB a temporary of 256 px


def jittered(patches: Tensor, scale: Floats, shift: Floats) -> Tensor:
    """Patches (n, 3, h, w) uint8, the amount of each stain multiplied by `scale` (n, 3) and moved by `shift` (n, 3).

    With S the stains' unit vectors and d a pixel's optical density, d S^-1 are the amounts, so the new density is
    d (S^-1 diag(scale) S) + shift S: one 3 x 3 product a pixel, written out, so that a patch's bits do not depend on
    its neighbours. A value v has the density -log((v + 1) / 256), for black has no finite one.
    """
    mix = ((np.linalg.inv(_UNIT) * scale[:, None, :]) @ _UNIT).astype(np.float32)
    mixes = torch.from_numpy(mix).to(patches.device)[..., None, None]
    offsets = torch.from_numpy((shift @ _UNIT).astype(np.float32)).to(patches.device)[..., None, None]
    # on a CPU one by one: vectorised logarithms may round the last values of an array differently
    size = _ON_DEVICE if patches.is_cuda else 1
    parts = zip(*(torch.split(x, size) for x in (patches, mixes, offsets)), strict=True)
    found = torch.empty_like(patches)
    for out, part in zip(torch.split(found, size), parts, strict=True):
        out.copy_(_changed(*part))
    return found


def _changed(patches: Tensor, mix: Tensor, offset: Tensor) -> Tensor:
    """Patches (n, 3, h, w), mix (n, 3, 3, 1, 1) and offset (n, 3, 1, 1) -> values (n, 3, h, w), rounded."""
    light = patches.float().add_(1).div_(256).log_()  # -density
    total = light[:, :1] * mix[:, 0]
    for stain in (1, 2):
        total += light[:, stain : stain + 1] * mix[:, stain]
    return total.sub_(offset).exp_().mul_(256).sub_(1).clamp_(0, 255).round_()
