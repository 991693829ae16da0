"""What the parts of a model say of themselves, so that it can check that they fit.

A part may say nothing: any `nn.Module` does as an encoder or as positions. Only what these classes declare is read,
for attributes of the same names mean other things elsewhere.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Part(nn.Module):
    """A part that says its width."""

    dim: int
    """D, of the embeddings that it makes or takes."""


class PatchEncoder(Part):
    """An encoder that says what it takes and gives: (n, C, h, w) or (n, F) -> (n, D)."""

    channels: int | None = None
    """C of the pixels that it takes; None says nothing."""
    inputs: int | None = None
    """F of the features that it takes; None says nothing."""


class Positions(Part):
    """A position encoding that says what it reads: the grid position (..., 2) of a patch, or its row index (...,)."""

    reads_index: bool = False
    limit: float = math.inf
    """Grid positions from there on are refused."""


@runtime_checkable
class Scores(Protocol):
    """An aggregator that selection can learn through."""

    def folded(self) -> Tensor:
        """(J, D), J = H*T, row h * T + t: an embedding times its transpose gives the attention logits of a patch."""
        ...


def can_be_read(x: Tensor) -> bool:
    """Whether the values of x can be checked for nothing: neither is a device waited for, nor a graph recorded."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
