from __future__ import annotations

import pytest
import torch
from torch import nn

from ips.network.aggregator import Aggregator
from ips.network.model import IPSModel
from ips.network.pooling import GatedAttention, MaxPool, MeanPool
from ips.selection.baselines import every_patch
from ips.selection.scorer import Scorer
from ips.selection.select import gather
from tests.ips.nets import TinyEncoder, bag_of


@pytest.mark.parametrize("pool", [MeanPool(2), MaxPool(2), GatedAttention(12, 2, 5), Aggregator(12, 2, 2, 3, 3, 5)])
def test_pools_ignore_what_is_masked(pool: nn.Module) -> None:
    pool.eval()
    x, mask = torch.randn(2, 9, 12), torch.arange(9)[None] < torch.tensor([[9], [4]])
    out = pool(torch.where(mask[..., None], x, 1e4), mask)
    assert out.shape == (2, 2, 12)
    torch.testing.assert_close(out[1:], pool(x[1:, :4], mask[1:, :4]))
    order = torch.randperm(9)
    torch.testing.assert_close(pool(x[:, order], mask[:, order]), pool(x, mask))


def test_pools_are_their_formulas() -> None:
    x, mask = torch.randn(1, 5, 12), torch.ones(1, 5, dtype=torch.bool)
    torch.testing.assert_close(MeanPool(2)(x, mask)[0, 1], x[0].mean(dim=0))
    torch.testing.assert_close(MaxPool(2)(x, mask)[0, 1], x[0].max(dim=0).values)
    gated = GatedAttention(12, 2, 7)
    scores = gated.score(torch.tanh(gated.content(x[0])) * torch.sigmoid(gated.gate(x[0])))
    torch.testing.assert_close(gated(x, mask)[0], scores.softmax(dim=0).T @ x[0])


@pytest.mark.parametrize("pool", [MeanPool(2), MaxPool(2), GatedAttention(12, 2, 5)])
def test_models_train_with_any_pool(pool: nn.Module) -> None:
    model = IPSModel(TinyEncoder(12), pool, {"a": nn.Linear(12, 1), "b": nn.Linear(12, 3)})
    bags = [bag_of(7, 1), bag_of(3, 2)]
    out = model(gather(bags, every_patch(bags), "cpu"))
    sum(logits.sum() for logits in out.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match=f"{type(pool).__name__} has no attention logits"):
        Scorer(model)
