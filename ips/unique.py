"""Which patches of a chunk are byte-equal, and which are one colour: exact, on the device the patches lie on."""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def unique_rows(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that stand for all others.

    A 64-bit random hash proposes groups; every proposal is then compared byte by byte, so the answer is exact: a
    collision only leaves a duplicate in.

    Args:
        patches: (n, ...), contiguous.

    Returns:
        rows (U,) int64, ascending, and inverse (n,) int64: patches[rows][inverse] equals patches, byte for byte.
    """
    n = len(patches)
    words = _words(patches)
    generator = torch.Generator().manual_seed(0)  # any fixed numbers do
    keys = torch.randint(-(2**62), 2**62, (words.shape[1],), generator=generator).to(words.device)
    mixed = words ^ (words.long() >> 32)  # or patches that differ in high bits alone would share their low hash bits
    hashes = (mixed * keys).sum(dim=1)  # wraps around, which is what a hash wants
    _, group = torch.unique(hashes, return_inverse=True)
    order = torch.arange(n, device=words.device)
    first = torch.full((n,), n, device=words.device).scatter_reduce(0, group, order, "amin")[group]
    later = (first != order).nonzero().squeeze(1)
    equal = (words[later] == words[first[later]]).all(dim=1)
    first[later[~equal]] = later[~equal]
    rows, inverse = torch.unique(first, return_inverse=True)
    return rows, inverse


def constant_rows(patches: Tensor) -> Tensor:
    """(n,) bool: True where all pixels of a patch (n, C, h, w) are the same colour."""
    corner = patches[:, :, :1, :1]
    likely = (patches[:, :, -1:, -1:] == corner).flatten(1).all(dim=1)  # spares most patches the full comparison
    rows = likely.nonzero().squeeze(1)
    likely[rows] = (patches[rows] == corner[rows]).flatten(1).all(dim=1)
    return likely


def _words(patches: Tensor) -> Tensor:
    """The bytes of each patch as the widest integers that divide them, (n, words)."""
    size = patches[0].numel() * patches.element_size()
    width = next(width for width in (8, 4, 2, 1) if size % width == 0)
    return patches.contiguous().flatten(1).view(torch.uint8).view(_WORDS[width])
