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

from ips.bag import Context
from ips.network.context import recalled


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

    def projection(self) -> Tensor:
        """The values' projections (H, D_v, D)."""
        return self.value_proj.weight.view(self.heads, self.value_dim, -1)

    def forward(self, x: Tensor, mask: Tensor, rest: Context | None = None) -> Tensor:
        """Pool x (B, M, D) where mask (B, M) is True, and the patches of `rest`, -> (B, T, D).

        Every image needs one True at least. Dropout passes by the rest, whose many weights would drop out to the mean.
        """
        logits = self.logits(x).masked_fill(~mask.unsqueeze(-1), -math.inf)
        if rest is None:
            weights_BMJ = logits.softmax(dim=1)
        else:
            log_mass, values_BJV = self._recalled(rest)
            all_BMJ = torch.cat((logits, log_mass.unsqueeze(1)), dim=1).softmax(dim=1)  # the rest as one patch more
            weights_BMJ, of_rest_BJ = all_BMJ[:, :-1], all_BMJ[:, -1]
        weights_BMJ = self.dropout(weights_BMJ)  # dropped after the softmax, as in the official code
        pooled_BHTD = torch.einsum("bmj,bmd->bjd", weights_BMJ, x).view(len(x), self.heads, self.tasks, -1)
        values_BHTV = torch.einsum("bhtd,hvd->bhtv", pooled_BHTD, self.projection())
        if rest is not None:
            values_BHTV = values_BHTV + (of_rest_BJ.unsqueeze(-1) * values_BJV).view_as(values_BHTV)
        return self.mixed(values_BHTV)

    def recall(self, whole: Context) -> Tensor:
        """Pool the patches of a context alone -> (B, T, D)."""
        _, values_BJV = self._recalled(whole)
        return self.mixed(values_BJV.view(len(values_BJV), self.heads, self.tasks, -1))

    def mixed(self, values_BHTV: Tensor) -> Tensor:
        """Pooled values (..., H, T, D_v) of each head -> (..., T, D)."""
        out: Tensor = self.out_proj(values_BHTV.transpose(-3, -2).flatten(-2))
        return out

    def _recalled(self, context: Context) -> tuple[Tensor, Tensor]:
        with torch.autocast(context.mean.device.type, enabled=False):  # masses of all N in bfloat16 have two digits
            return recalled(context, self.folded(), self.projection())
