"""Multi-head cross-attention with learned queries (paper section 3, equations of the patch aggregator).

Two products are reassociated, which changes nothing but the cost. With W_k,h, W_q,h, W_v,h the projections of head h
and q_t the query of task t:

- logits: (W_q,h q_t) . (W_k,h x) / sqrt(D_k) = a_ht . x with a_ht = W_k,h^T W_q,h q_t / sqrt(D_k), the *folded
  query*: D multiplications a logit instead of D * D_k, and no keys are ever stored;
- values: sum_n p_n W_v,h x_n = W_v,h (sum_n p_n x_n): one projection a token instead of one a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """T learned queries attend to a set of patches.

    Symbols: D `dim`, T `tasks`, H `heads`, D_k `key_dim`, D_v `value_dim` (both of one head).
    """

    def __init__(self, dim: int, tasks: int, heads: int, key_dim: int, value_dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.tasks, self.heads, self.key_dim, self.value_dim = tasks, heads, key_dim, value_dim
        bound = math.sqrt(1 / key_dim)  # the official initialisation
        self.queries = nn.Parameter(torch.empty(tasks, dim).uniform_(-bound, bound))
        self.query_proj = nn.Linear(dim, heads * key_dim, bias=False)
        self.key_proj = nn.Linear(dim, heads * key_dim, bias=False)
        self.value_proj = nn.Linear(dim, heads * value_dim, bias=False)
        self.out_proj = nn.Linear(heads * value_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        # holds nothing; by its shape a state dict with other H and D_k of the same product does not load
        self.register_buffer("heads_by_key_by_value", torch.empty(heads, key_dim, value_dim, 0))

    def folded(self) -> Tensor:
        """The folded queries a_ht as (J, D), row h * T + t."""
        q_THK = self.query_proj(self.queries).view(self.tasks, self.heads, self.key_dim)
        keys_HKD = self.key_proj.weight.view(self.heads, self.key_dim, -1)
        folded = torch.einsum("thk,hkd->htd", q_THK, keys_HKD) / math.sqrt(self.key_dim)
        return folded.flatten(0, 1)

    def unfolded(self) -> tuple[Tensor, Tensor]:
        """The two factors of `folded`: keys' projection (H*D_k, D), and the scaled queries (J, H*D_k), head by head."""
        q_THK = self.query_proj(self.queries).view(self.tasks, self.heads, self.key_dim) / math.sqrt(self.key_dim)
        own_head = torch.eye(self.heads, dtype=q_THK.dtype, device=q_THK.device)
        return self.key_proj.weight, torch.einsum("thk,hg->htgk", q_THK, own_head).flatten(2).flatten(0, 1)

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., J)."""
        return nn.functional.linear(x, self.folded())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Pool x (B, M, D) where mask (B, M) is True -> (B, T, D). Every image needs one True at least."""
        logits = self.logits(x).masked_fill(~mask.unsqueeze(-1), -math.inf)
        weights_BMJ = self.dropout(logits.softmax(dim=1))  # dropped after the softmax, as in the official code
        pooled_BHTD = torch.einsum("bmj,bmd->bjd", weights_BMJ, x).view(len(x), self.heads, self.tasks, -1)
        values_HVD = self.value_proj.weight.view(self.heads, self.value_dim, -1)
        context_BTHV = torch.einsum("bhtd,hvd->bthv", pooled_BHTD, values_HVD)
        out: Tensor = self.out_proj(context_BTHV.flatten(-2))
        return out
