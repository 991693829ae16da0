from __future__ import annotations

import pytest
import torch
from torch import nn

from ips.baselines import GatedAttention, MaxPool, MeanPool, every_patch, random_selection
from ips.network.aggregator import Aggregator
from ips.network.model import IPSModel
from ips.selection.scorer import Scorer
from ips.selection.select import gather
from tests.ips.nets import TinyEncoder, bag_of


def test_random_selection_draws_different_rows_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    bags = [bag_of(20), bag_of(3)]
    counts = torch.zeros(20)
    for _ in range(400):
        selection = random_selection(bags, 5, generator)
        assert len(set(selection.index[0].tolist())) == 5
        counts[selection.index[0]] += 1
    assert 60 < counts.min() <= counts.max() < 140  # 100 expected, sd 8.7
    assert sorted(selection.index[1].tolist()) == [-1, -1, 0, 1, 2]
    torch.testing.assert_close(selection.scores[0], torch.full((5,), 1 / 20))
    again = random_selection(bags, 5, torch.Generator().manual_seed(0))
    assert torch.equal(again.index, random_selection(bags, 5, torch.Generator().manual_seed(0)).index)


def test_every_patch_keeps_all_in_order() -> None:
    selection = every_patch([bag_of(4), bag_of(2)])
    assert selection.index.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]
    assert selection.mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_nothing_to_choose_from_is_named() -> None:
    generator = torch.Generator()
    for bags, message in (([], "bags holds no image"), ([bag_of(3), bag_of(0)], r"bags\[1\] is empty")):
        with pytest.raises(ValueError, match=message):
            every_patch(bags)
        with pytest.raises(ValueError, match=message):
            random_selection(bags, 2, generator)
    with pytest.raises(ValueError, match="memory=0 must be a whole number, at least 1"):
        random_selection([bag_of(3)], 0, generator)


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
