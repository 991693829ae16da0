"""What selection has to beat: other ways to choose patches, and other ways to pool them. Same model, same bags.

`IPSModel` takes the pools in place of `Aggregator`; they have no attention logits, so they go with `random_selection`
or `every_patch`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ips.bag import Bag, Selection
from ips.selection.intake import check_bags
from ips.selection.select import assemble


def random_selection(bags: Sequence[Bag], memory: int, generator: torch.Generator) -> Selection:
    """M different patches of each image, drawn uniformly; every score is 1 / N. ValueError where `select` raises it."""
    check_bags(bags, memory)
    draws = [torch.randperm(len(bag), generator=generator)[:memory] for bag in bags]
    return assemble([(rows, _uniform(rows, len(bag))) for rows, bag in zip(draws, bags, strict=True)], memory)


def every_patch(bags: Sequence[Bag]) -> Selection:
    """All patches of each image, in order: full attention, where it fits. ValueError for no bags and for empty ones."""
    check_bags(bags, memory=1)
    longest = max(len(bag) for bag in bags)
    return assemble([(rows, _uniform(rows, len(rows))) for rows in map(torch.arange, map(len, bags))], longest)


def _uniform(rows: Tensor, N: int) -> Tensor:
    return torch.full(rows.shape, -math.log(N), dtype=torch.float64)


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


class GatedAttention(nn.Module):
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
