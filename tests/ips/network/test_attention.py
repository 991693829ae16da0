from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ips.network.attention import CrossAttention


def _plain(attention: CrossAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Head by head with keys and values of every patch: logits (n, H, T) and context (T, D)."""
    H, T, K, V = attention.heads, attention.tasks, attention.key_dim, attention.value_dim
    logits = torch.empty(len(x), H, T)
    context = torch.empty(T, H * V)
    for h in range(H):
        keys = attention.key_proj(x)[:, h * K : (h + 1) * K]
        queries = attention.query_proj(attention.queries)[:, h * K : (h + 1) * K]
        values = attention.value_proj(x)[:, h * V : (h + 1) * V]
        logits[:, h] = keys @ queries.T / math.sqrt(K)
        context[:, h * V : (h + 1) * V] = logits[:, h].softmax(dim=0).T @ values
    return logits, attention.out_proj(context)


def _attention() -> CrossAttention:
    torch.manual_seed(0)
    return CrossAttention(dim=12, tasks=3, heads=2, key_dim=5, value_dim=7, dropout=0.5).eval()


def test_folded_queries_and_pooling_are_the_plain_attention() -> None:
    attention, x = _attention(), torch.randn(2, 19, 12)
    out = attention(x, torch.ones(2, 19, dtype=torch.bool))
    for image in range(2):
        logits, context = _plain(attention, x[image])
        torch.testing.assert_close(attention.logits(x[image]), logits.flatten(1))
        torch.testing.assert_close(out[image], context)


def test_masked_patches_do_not_exist() -> None:
    attention, x = _attention(), torch.randn(2, 19, 12)
    mask = torch.rand(2, 19) < 0.4
    mask[:, 0] = True
    noisy = torch.where(mask[..., None], x, 1e6)
    out = attention(noisy, mask)
    for image in range(2):
        torch.testing.assert_close(out[image], _plain(attention, x[image][mask[image]])[1])


def test_gradient_flows_through_the_folded_query() -> None:
    attention = _attention().double()
    x = torch.randn(1, 4, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True]])
    assert torch.autograd.gradcheck(lambda y: attention(y, mask), (x,))
    attention(x, mask).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attention.parameters())


def test_dropout_only_while_training() -> None:
    attention, x, mask = _attention(), torch.randn(1, 9, 12), torch.ones(1, 9, dtype=torch.bool)
    assert torch.equal(attention(x, mask), attention(x, mask))
    attention.train()
    assert not torch.equal(attention(x, mask), attention(x, mask))


def test_queries_start_within_the_official_bound() -> None:
    attention = CrossAttention(256, 4, 8, 16, 16)
    assert 0.2 < attention.queries.abs().max() <= 0.25
    assert not any(isinstance(m, nn.Linear) and m.bias is not None for m in attention.modules())


def test_the_folded_query_is_the_product_of_its_factors() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(12, 2, 3, 5, 7)
    keys, queries = attention.unfolded()
    assert keys.shape == (15, 12)
    assert queries.shape == (6, 15)
    torch.testing.assert_close(queries @ keys, attention.folded())
