from __future__ import annotations

import pytest
import torch
from torch import nn

from ips.bag import TensorBag
from ips.network.aggregator import Aggregator
from ips.network.heads import linear_head, probabilities
from ips.network.model import IPSModel, evaluating
from ips.network.positions import GridPositions
from ips.selection.predict import predict
from ips.selection.select import gather, select
from tests.ips.nets import TinyEncoder, bag_of, tiny_model


def _model() -> IPSModel:
    torch.manual_seed(0)
    heads = {"er": linear_head("binary", 12, 2), "grade": linear_head("multiclass", 12, 3)}
    return IPSModel(TinyEncoder(12), Aggregator(12, 2, 2, 3, 3, 5), heads, GridPositions(12))


def test_it_is_the_selection_the_model_and_what_logits_mean() -> None:
    model, bags = _model().train(), [bag_of(23, 1, grid=True), bag_of(3, 2, grid=True)]
    found = predict(model, bags, 6, 4, attention=True)
    assert all(module.training for module in model.modules())
    with torch.no_grad(), evaluating(model):
        logits = model(gather(bags, selection := select(model, bags, 6, 4), "cpu"))
    assert torch.equal(found.selection.index, selection.index)
    for task, kind in (("er", "binary"), ("grade", "multiclass")):
        torch.testing.assert_close(found.probabilities[task], probabilities(kind, logits[task]))  # type: ignore[arg-type]
    assert found.probabilities["grade"].shape == (2, 3)
    assert found.selection.attention is not None
    assert not found.probabilities["er"].requires_grad


def test_heads_may_say_which_patches() -> None:
    model, bags = _model(), [bag_of(83, 1, grid=True)]
    found = predict(model, bags, 6, 4, rank="heads").selection.index
    assert torch.equal(found, select(model, bags, 6, 4, rank="heads").index)
    assert not torch.equal(found, select(model, bags, 6, 4).index)


def test_the_callers_autocast_does_not_reach_inside() -> None:
    model, bags = _model(), [bag_of(23, 1, grid=True)]
    alone = predict(model, bags, 6, 4).probabilities
    with torch.autocast("cpu", torch.bfloat16):
        found = predict(model, bags, 6, 4).probabilities
    assert all(torch.equal(found[task], alone[task]) for task in alone)


def test_no_more_than_a_chunk_is_encoded_at_a_time() -> None:
    model, taken = _model(), []

    class Counting(TensorBag):
        def take(self, rows):  # type: ignore[no-untyped-def]
            taken.append(len(rows))
            return super().take(rows)

    bag = bag_of(23, grid=True)
    predict(model, [Counting(bag.patches, bag.positions)], 9, 4)
    assert taken == [4, 4, 1]


def test_heads_must_say_what_they_mean() -> None:
    with pytest.raises(
        ValueError, match=r"its heads of \['task.0', 'task.1'\] do not say .* make them by `linear_head`"
    ):
        predict(tiny_model(), [bag_of(5)], 3, 4)
    with pytest.raises(ValueError, match="model is a Linear"):
        predict(nn.Linear(3, 3), [bag_of(5)], 3, 4)
