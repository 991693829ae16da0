"""Sinusoidal position encodings, added to embeddings after the encoder (paper section 3, official `pos_enc_1d`).

Functions of the position alone: no table, no fixed N, so images of any size go through one model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ips.network.part import Positions

BASE = 10_000.0
"""The longest wavelength is 2*pi*BASE grid units; positions from BASE on are refused."""


def sinusoid(position: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Encode positions (...,) as (..., dim): sin at even places, cos at odd, wavelengths 2*pi to 2*pi*BASE."""
    exact = torch.promote_types(dtype, torch.float32)  # bfloat16 does not tell 300 from 301
    rates = torch.exp(torch.arange(0, dim, 2, dtype=exact, device=position.device) * (-math.log(BASE) / dim))
    angle = position.to(exact).unsqueeze(-1) * rates
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2).to(dtype)


def check_positions(positions: Tensor, limit: float, name: str) -> None:
    """Refuse, by ValueError that begins with `name`, positions (..., 2) not finite, negative, or not below `limit`."""
    if not ((positions >= 0) & (positions < limit)).all():
        low, high = positions.min().item(), positions.max().item()
        raise ValueError(f"{name} reach from {low:g} to {high:g}; they must be finite, >= 0 and < {limit:g}")


class IndexPositions(Positions):
    """1-D encoding of the row index of a patch (the paper's).

    Raises:
        ValueError: `dim` is odd.
    """

    reads_index = True
    index: Tensor
    """Empty; its dtype, which follows the module's, is that of the codes, and its name tells state dicts apart."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim={dim} is odd; sinusoids come in pairs, so it must be even")
        self.dim = dim
        self.register_buffer("index", torch.empty(0))

    def forward(self, index: Tensor) -> Tensor:
        """(...,) int64 -> (..., D)."""
        return sinusoid(index, self.dim, self.index.dtype)


class GridPositions(Positions):
    """2-D encoding: the first half of D encodes the column, the second the row.

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """

    limit = BASE
    grid: Tensor
    """Empty; its dtype, which follows the module's, is that of the codes, and its name tells state dicts apart."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim={dim} must be a multiple of 4: sin and cos of column and row")
        self.dim = dim
        self.register_buffer("grid", torch.empty(0))

    def forward(self, positions: Tensor) -> Tensor:
        """(..., 2) float (column, row) in grid units -> (..., D)."""
        return torch.cat([sinusoid(positions[..., axis], self.dim // 2, self.grid.dtype) for axis in (0, 1)], dim=-1)
