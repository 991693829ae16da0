"""From cached logits to winners: normalisers, log scores, the order. Host, float64, fixed sums.

Score of patch n over a set S (paper Algorithm 1, official `get_scores`): s_n = (1/J) sum_j exp(l_nj - log Z_j) with
Z_j = sum over m in S of exp(l_mj). Ranking is by log s_n, which does not underflow; ties go to the smaller row.

Where all patches are pooled (`ips.network.context`), the encoder's gradient is a sum over all of them, and patch n's
part of it is in proportion to its attention. The best M alone give a biased part of that sum. `ByAttention` draws M
with chances pi_n in proportion to s_n, as far as they are below 1, and divides each part by pi_n: the mean over draws
is the whole sum, and weights are large only where the attention is small (Horvitz and Thompson 1952; drawn
systematically, in random order, Madow 1949). Where M patches have all the attention, these are certain: the best M.

`in_turns` lets the J logits, which are the heads' for each task, choose instead of their mean: j = 0, 1, ..., J - 1 and
again take the patch that is their best of those left, until M are taken. Within one j the softmax keeps the order of
l_nj, so no sum over S is needed, and who is not taken of some patches is not taken of more (proof at `in_turns`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rank = Literal["mean", "heads"]
"""Who wins: the best by the mean over heads and tasks, or those that each of them takes in turn."""

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


def in_turns(logits: Tensor, index: Tensor, memory: int) -> Tensor:
    """Places of the patches that the heads and tasks take in turn, ties to the smaller of `index` -> (<= M,), in turns.

    Taking in turns needs no more than the taken ones of what came before: let t join the patches S. At each turn, what
    is left of S + t is what is left of S and one more, at first t; whoever takes the one more leaves what it would have
    taken as the new one more. So all that is taken of S + t is t or was taken of S: M patches are all that has to be
    kept of a stream, in whatever order and pieces it comes.

    Args:
        logits: (n, J).
        index: (n,), all different.
        memory: M.
    """
    count = min(memory, len(logits))
    wishes = [iter(column) for column in _firsts(logits, index, count)]
    taken: dict[int, None] = {}
    for turn in range(count):
        taken[next(place for place in wishes[turn % len(wishes)] if place not in taken)] = None
    return torch.tensor(list(taken))


def _firsts(logits: Tensor, index: Tensor, count: int) -> list[list[int]]:
    """Of each column the places of its `count` best, which are all that it may take: no more are gone before."""
    least = logits.t().contiguous().topk(count).values[:, -1]
    likely = (logits >= least).any(dim=1).nonzero().squeeze(1)  # sorts J * M rows instead of N, but for ties
    likely = likely[index[likely].argsort()]
    order = logits[likely].t().argsort(dim=1, descending=True, stable=True)[:, :count]
    return likely[order].tolist()


def winners(logits: Tensor, index: Tensor, memory: int, rank: Rank) -> tuple[Tensor, Tensor]:
    """Logits (n, J) of rows `index` (n,) -> places (<= M,), best by the mean score first, and their log scores."""
    keys = log_scores(logits, log_normalisers(logits))
    if rank == "mean":
        keep = best(keys, index, memory)
    else:
        keep = in_turns(logits, index, memory)
        keep = keep[best(keys[keep], index[keep], memory)]
    return keep, keys[keep]


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
