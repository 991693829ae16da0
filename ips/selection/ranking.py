"""From cached logits to winners: normalisers, log scores, the order. Host, float64, fixed sums.

Score of patch n over a set S (paper Algorithm 1, official `get_scores`): s_n = (1/J) sum_j exp(l_nj - log Z_j) with
Z_j = sum over m in S of exp(l_mj). Ranking is by log s_n, which does not underflow; ties go to the smaller row.
"""

from __future__ import annotations

import math

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
