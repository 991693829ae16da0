"""The pooling transformer that turns M patch embeddings into T task tokens (paper section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ips.bag import Context, check_mask
from ips.network.attention import CrossAttention
from ips.network.part import Part, can_be_read


class Aggregator(Part):
    """One layer: cross-attention, then an MLP, each with a residual and a layer norm after it.

    The residual of the attention is the query, not the patches, and keys and values are not normed, as in the
    official code. The same attention scores patches during selection, so selection learns through the aggregator.

    Args:
        dim: D, width of the patch embeddings and of the tokens.
        tasks: T, one learned query a task.
        heads: H.
        key_dim: D_k of one head.
        value_dim: D_v of one head.
        hidden_dim: width of the MLP.
        dropout: after the softmax, after the output projection and after the MLP.
    """

    def __init__(
        self,
        dim: int,
        tasks: int,
        heads: int = 8,
        key_dim: int = 64,
        value_dim: int = 64,
        hidden_dim: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.dim, self.tasks = dim, tasks
        self.attention = CrossAttention(dim, tasks, heads, key_dim, value_dim, dropout)
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def folded(self) -> Tensor:
        """The folded queries (J, D): a patch's logits are its embedding times their transpose."""
        return self.attention.folded()

    def forward(self, x: Tensor, mask: Tensor, rest: Context | None = None) -> Tensor:
        """Pool x (B, M, D) where mask (B, M) is True, and the patches of `rest`, -> tokens (B, T, D).

        Raises:
            ValueError: another D, a mask of another shape or not of bool; on a CPU, an image of which nothing is
                unmasked (elsewhere its tokens are NaN: to look would be to wait for the device).
        """
        if x.ndim != 3 or x.shape[2] != self.dim or mask.shape != x.shape[:2] or mask.dtype != torch.bool:
            found = f"x has shape {tuple(x.shape)}, mask {tuple(mask.shape)} and {mask.dtype}"
            raise ValueError(f"{found}; needs (B, M, {self.dim}) and (B, M) bool")
        if can_be_read(mask):
            check_mask(mask)
        return self.tokens(self.attention(x, mask, rest))

    def recall(self, whole: Context) -> Tensor:
        """Pool the patches of a context alone -> tokens (B, T, D)."""
        return self.tokens(self.attention.recall(whole))

    def tokens(self, pooled: Tensor) -> Tensor:
        """What the attention gives (..., T, D) -> tokens (..., T, D)."""
        tokens = self.attention_norm(self.dropout(pooled) + self.attention.queries)
        out: Tensor = self.mlp_norm(self.dropout(self.mlp(tokens)) + tokens)
        return out
