"""What attention has to beat: other ways to pool patches. `IPSModel` takes them in place of `Aggregator`.

They have no attention logits, so they go with `random_selection` or `every_patch`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ips.network.part import Part


class MeanPool(nn.Module):
    """The mean embedding, for every task."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Pool x (B, M, D) where mask (B, M) is True -> (B, T, D)."""
        weights = mask.to(x.dtype) / mask.sum(dim=1, keepdim=True)
        return torch.einsum("bm,bmd->bd", weights, x).unsqueeze(1).expand(-1, self.tasks, -1)


class MaxPool(nn.Module):
    """The largest value of each coordinate, for every task."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Pool x (B, M, D) where mask (B, M) is True -> (B, T, D)."""
        kept = x.masked_fill(~mask.unsqueeze(-1), -math.inf)
        return kept.amax(dim=1).unsqueeze(1).expand(-1, self.tasks, -1)


class GatedAttention(Part):
    """Gated attention pooling (ABMIL; Ilse et al. 2018, equation 9), one attention a task.

    a_n = softmax_n(w^T (tanh(V x_n) * sigmoid(U x_n))) and the token is sum_n a_n x_n.

    Args:
        dim: D.
        tasks: T.
        hidden_dim: rows of V and U.
    """

    def __init__(self, dim: int, tasks: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.dim, self.tasks = dim, tasks
        self.content = nn.Linear(dim, hidden_dim)
        self.gate = nn.Linear(dim, hidden_dim)
        self.score = nn.Linear(hidden_dim, tasks)

    def weights(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attention a_n of x (B, M, D) where mask (B, M) is True -> (B, M, T); sums to 1 over M."""
        scores: Tensor = self.score(self.content(x).tanh() * self.gate(x).sigmoid())
        return scores.masked_fill(~mask.unsqueeze(-1), -math.inf).softmax(dim=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Pool x (B, M, D) where mask (B, M) is True -> (B, T, D)."""
        return torch.einsum("bmt,bmd->btd", self.weights(x, mask), x)
