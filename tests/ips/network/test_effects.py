from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ips.bag import TensorBag, Values
from ips.network.effects import effects, growing
from ips.network.model import IPSModel, evaluating
from ips.selection.select import select
from tests.ips.nets import TinyEncoder, bag_of, model_of, tiny_model
from tests.oracle import full_attention


def _embedded(model: IPSModel, bag: TensorBag) -> Tensor:
    with evaluating(model), torch.no_grad():
        x = model.embed(bag.patches)
        assert model.position is not None
        assert bag.positions is not None
        placed: Tensor = x + model.position(bag.positions)
        return placed


@settings(max_examples=6, deadline=None)
@given(st.integers(2, 30), st.sampled_from([0.1, 20.0, 3000.0]), st.integers(0, 10**6), st.integers(1, 9))
def test_leaving_a_patch_out_is_leaving_it_out(n: int, scale: float, seed: int, memory: int) -> None:
    """Against brute force: the network on all patches but one. At the largest scale one patch has all of a head."""
    model, bag = tiny_model(grid=True, scale=scale, seed=seed).double().train(), bag_of(n, seed, grid=True)
    (values,) = select(model, [bag], memory, 4, values=True).values or ()
    found = effects(model, values)
    assert all(module.training for module in model.modules())
    x = _embedded(model, bag)
    with evaluating(model), torch.no_grad():
        for task, logits in full_attention(model, x).items():
            torch.testing.assert_close(found.outputs[task], logits, rtol=1e-9, atol=1e-10)
        for row in range(n):
            for task, logits in full_attention(model, torch.cat((x[:row], x[row + 1 :]))).items():
                torch.testing.assert_close(found.without[task][row], logits, rtol=1e-9, atol=1e-10)
    for task, change in found.changes().items():
        assert torch.equal(change, found.outputs[task] - found.without[task])


def test_the_outputs_are_those_of_a_prediction_with_context() -> None:
    torch.manual_seed(0)
    model, bag = model_of(TinyEncoder(12), 12), bag_of(23)
    found = select(model, [bag], 4, 5, values=True, context="whole")
    assert found.values is not None
    assert found.whole is not None
    with evaluating(model), torch.no_grad():
        for task, logits in model.recall(found.whole).items():
            torch.testing.assert_close(effects(model, found.values[0]).outputs[task], logits[0], rtol=1e-5, atol=1e-5)


def test_a_patch_alone_cannot_be_left_out() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="the image has 1 patch, and without it there is nothing to say"):
        effects(model, Values(torch.zeros(1, 6), torch.zeros(1, 3, 7)))


def test_many_patches_are_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bag = tiny_model(), bag_of(23)
    (values,) = select(model, [bag], 4, 5, values=True).values or ()
    whole = effects(model, values)
    monkeypatch.setattr("ips.network.effects._BLOCK", 5)
    for task, without in effects(model, values).without.items():
        torch.testing.assert_close(without, whole.without[task])
        assert without.shape[0] == 23


def test_other_pools_have_no_effects() -> None:
    model = tiny_model()
    model.aggregator = torch.nn.Identity()
    with pytest.raises(ValueError, match="Identity cannot pool patches that it does not see; context needs Aggregator"):
        effects(model, Values(torch.zeros(2, 6), torch.zeros(2, 3, 7)))


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 30), st.sampled_from([0.1, 20.0, 3000.0]), st.integers(0, 10**6))
def test_a_pool_that_grows_is_that_of_the_patches_so_far(n: int, scale: float, seed: int) -> None:
    """Against brute force: the network on those patches alone."""
    model, bag = tiny_model(grid=True, scale=scale, seed=seed).double().train(), bag_of(n, seed, grid=True)
    (values,) = select(model, [bag], 3, 4, values=True).values or ()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    counts = sorted({1, (n + 1) // 2, n})
    found, back, alone = growing(model, values, [(order, counts), (order.flip(0), counts), (order[:1], [1])])
    assert all(module.training for module in model.modules())
    x = _embedded(model, bag)
    with evaluating(model), torch.no_grad():
        for place, count in enumerate(counts):
            for task, logits in full_attention(model, x[order[:count]]).items():
                torch.testing.assert_close(found[task][place], logits, rtol=1e-9, atol=1e-10)
            for task, logits in full_attention(model, x[order.flip(0)[:count]]).items():
                torch.testing.assert_close(back[task][place], logits, rtol=1e-9, atol=1e-10)
    for task, logits in alone.items():
        torch.testing.assert_close(logits, found[task][:1], rtol=1e-9, atol=1e-10)
