"""From cached logits to winners: normalisers, log scores, the order. Host, float64, fixed sums.

Score of patch n over a set S (paper Algorithm 1, official `get_scores`): s_n = (1/J) sum_j exp(l_nj - log Z_j) with
Z_j = sum over m in S of exp(l_mj). Ranking is by log s_n, which does not underflow; ties go to the smaller row.

Where all patches are pooled (`ips.network.context`), the encoder's gradient is a sum over all of them, and patch n's
part of it is in proportion to its attention. The best M alone give a biased part of that sum. `ByAttention` draws M
with chances pi_n in proportion to s_n, as far as they are below 1, and divides each part by pi_n: the mean over draws
is the whole sum, and weights are large only where the attention is small (Horvitz and Thompson 1952; drawn
systematically, in random order, Madow 1949). Where M patches have all the attention, these are certain: the best M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 65_536  # rows at a time: bounds the float64 copy to 8 * J * 64k bytes, and fixes the order of the sums


def log_normalisers(logits: Tensor) -> Tensor:
    """Logits (N, J) -> log Z (J,) float64, summed in row order."""
    total = torch.full((logits.shape[1],), -math.inf, dtype=torch.float64)
    for block in torch.split(logits, _BLOCK):
        total = torch.logaddexp(total, block.double().logsumexp(dim=0))
    return total


def log_scores(logits: Tensor, log_z: Tensor) -> Tensor:
    """Logits (N, J) and log Z (J,) -> log s (N,) float64."""
    J = logits.shape[1]
    parts = [(block.double() - log_z).logsumexp(dim=1) - math.log(J) for block in torch.split(logits, _BLOCK)]
    return torch.cat(parts)


def best(keys: Tensor, index: Tensor, memory: int) -> Tensor:
    """Places of the `memory` largest of `keys` (n,), best first, ties to the smaller of `index` (n,) -> (<= M,)."""
    by_index = index.argsort()
    order = by_index[keys[by_index].argsort(descending=True, stable=True)]
    return order[:memory]


@dataclass(frozen=True)
class ByAttention:
    """`draw` of `select` with `context="rest"`: M patches by their attention, for the encoder's gradient over all N.

    A pure function of the scores and the seed: the same in every process that has the scores and in a run that is
    resumed. Scores that differ by rounding change a patch only where a chance's end falls between two.
    """

    seed: int = 0
    """Another one for each image and epoch, from 0 to 2^32 - 1."""

    def __call__(self, keys: Tensor, memory: int) -> tuple[Tensor, Tensor]:
        """Log scores (N,) -> rows (m <= M,), best first, and one over the chance of each (m,)."""
        generator = torch.Generator().manual_seed(self.seed)
        chance = chances(keys, memory)
        shuffled = torch.randperm(len(keys), generator=generator)
        ends = chance[shuffled].cumsum(0).clamp(max=memory)
        steps = (ends - torch.rand((), generator=generator, dtype=torch.float64)).floor()
        drawn = shuffled[steps.diff(prepend=steps.new_full((1,), -1.0)) > 0]
        rows = drawn[best(keys[drawn], drawn, memory)]
        return rows, (1 / chance[rows]).float()


def chances(keys: Tensor, memory: int) -> Tensor:
    """Log scores (N,) -> chances (N,) that add up to M and are in proportion to the scores where these are below 1."""
    scores = (keys - keys.max()).exp().clamp(min=1e-200)  # none is hopeless
    certain = torch.zeros(len(keys), dtype=torch.bool)
    while True:
        left, others = max(0, memory - int(certain.sum())), scores.where(~certain, 0.0)
        chance = torch.where(certain, 1.0, left * others / others.sum())
        more = (chance > 1 - 1e-12) & ~certain  # rounding leaves none out of M = N
        if not more.any():
            return chance
        certain |= more
