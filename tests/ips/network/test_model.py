from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

from ips.bag import Batch
from ips.network.aggregator import Aggregator
from ips.network.encoder import FeatureProjector
from ips.network.model import IPSModel
from ips.network.pooling import GatedAttention, MeanPool
from ips.network.positions import GridPositions, IndexPositions
from ips.selection.baselines import every_patch
from ips.selection.select import gather, select
from tests.ips.nets import TinyEncoder, bag_of, model_of, tiny_model


def test_uint8_and_float_pixels_are_the_same_pixels() -> None:
    model = tiny_model().eval()
    patches = bag_of(5).patches
    expected = (patches / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.25]).view(
        3, 1, 1
    )
    torch.testing.assert_close(model.normalise(patches), expected)
    torch.testing.assert_close(model.normalise(patches / 255), expected)
    features = torch.randn(4, 3)
    assert torch.equal(model.normalise(features), features)


def test_logits_by_task_in_the_order_of_tokens() -> None:
    model = tiny_model().eval()
    bags = [bag_of(9, 1), bag_of(5, 2)]
    batch = gather(bags, select(model, bags, 5, 3), "cpu")
    out = model(batch)
    assert {task: tuple(logits.shape) for task, logits in out.items()} == {"task.0": (2, 1), "task.1": (2, 2)}
    tokens = model.aggregator(model.embed(batch.patches.flatten(0, 1)).view(2, 5, -1), batch.mask)
    torch.testing.assert_close(out["task.1"], model.heads[1](tokens[:, 1]))


def _cut(batch: Batch, image: int, kept: int) -> Batch:
    assert batch.positions is not None
    part = slice(image, image + 1), slice(0, kept)
    return Batch(batch.patches[part], batch.positions[part], batch.index[part], batch.mask[part])


def test_padding_changes_nothing() -> None:
    model = tiny_model(grid=True).eval()
    bags = [bag_of(9, 1, grid=True), bag_of(3, 2, grid=True)]
    batch = gather(bags, select(model, bags, 7, 3), "cpu")
    together = model(batch)
    for image, kept in ((0, 7), (1, 3)):
        for task, logits in model(_cut(batch, image, kept)).items():
            torch.testing.assert_close(together[task][image], logits[0])


def test_padding_enters_no_batch_statistics_and_no_gradient() -> None:
    padded, plain = tiny_model().train(), tiny_model().train()
    for model in (padded, plain):
        model.encoder.get_submodule("dropout").eval()
    bag = bag_of(4)
    long = gather([bag], select(padded, [bag], 50, 3), "cpu")
    short = gather([bag], select(plain, [bag], 4, 3), "cpu")
    for model, batch in ((padded, long), (plain, short)):
        model.aggregator.eval()
        model(batch)["task.1"].sum().backward()
    for (name, a), (_, b) in zip(padded.state_dict().items(), plain.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for (name, p), (_, q) in zip(padded.named_parameters(), plain.named_parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_positions_matter_and_must_be_there() -> None:
    model = tiny_model(grid=True).eval()
    bag = bag_of(9, grid=True)
    batch = gather([bag], select(model, [bag], 5, 3), "cpu")
    assert batch.positions is not None
    moved = Batch(batch.patches, batch.positions + 3, batch.index, batch.mask)
    assert not torch.allclose(model(batch)["task.0"], model(moved)["task.0"])
    with pytest.raises(ValueError, match="positions: the model encodes grid positions"):
        model(Batch(batch.patches, None, batch.index, batch.mask))
    for bad in (-1.0, 1e4, torch.nan):
        places = batch.positions.clone()
        places[0, 2, 1] = bad
        with pytest.raises(ValueError, match=r"positions reach from .* to .*; they must be finite, >= 0 and < 10000"):
            model(Batch(batch.patches, places, batch.index, batch.mask))
    model.position = IndexPositions(12)
    assert torch.equal(model(batch)["task.0"], model(moved)["task.0"])


def test_no_padding_ever_reaches_the_encoder() -> None:
    seen: list[int] = []
    model = tiny_model().eval()
    model.encoder.register_forward_hook(lambda _m, args, _out: seen.append(len(args[0])))
    bags = [bag_of(3, 1), bag_of(2, 2)]
    model(gather(bags, select(model, bags, 6, 3), "cpu"))
    assert seen[-1] == 5


def test_bad_compositions_are_named() -> None:
    encoder, aggregator = TinyEncoder(12), Aggregator(12, 2, 2, 3, 3, 5)
    with pytest.raises(ValueError, match="heads has 1 tasks"):
        IPSModel(encoder, aggregator, {"a": nn.Linear(12, 1)})
    heads = {"a": nn.Linear(12, 1), "b": nn.Linear(12, 1)}
    with pytest.raises(ValueError, match="need equal lengths and std > 0"):
        IPSModel(encoder, aggregator, heads, mean=(0, 0, 0), std=(1, 1))
    with pytest.raises(ValueError, match="std > 0"):
        IPSModel(encoder, aggregator, heads, mean=(0, 0, 0), std=(1, 0, 1))
    with pytest.raises(ValueError, match=r"one width D, found {'encoder': 16, 'aggregator': 12, .*'b'\]\": 12}"):
        IPSModel(TinyEncoder(16), aggregator, heads)
    with pytest.raises(ValueError, match=r"one width D, found {.*\"heads\['a'\]\": 12, \"heads\['b'\]\": 10}"):
        IPSModel(encoder, aggregator, {**heads, "b": nn.Linear(10, 1)})
    with pytest.raises(ValueError, match=r"one width D, found {'aggregator': 12, .heads.*: 10}"):
        IPSModel(nn.Flatten(), GatedAttention(12, 1), {"a": nn.Linear(10, 1)})
    IPSModel(encoder, aggregator, {"a": nn.LazyLinear(1), "b": nn.Sequential(nn.Linear(12, 1))})
    with pytest.raises(ValueError, match=r"one width D, found {.*'position': 8,"):
        IPSModel(encoder, aggregator, heads, GridPositions(8))


class _Plain(nn.Module):
    """An encoder that does not say its width: the first numbers of a patch, in `shape`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : math.prod(self.shape)].reshape(len(x), *self.shape)


@pytest.mark.parametrize("shape", [(10,), (16,), (20,), (12, 2, 3), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_of_another_shape_are_named(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of 10 and 16 numbers too, which the padding of the scorer's product to 16 would make fit."""
    model, bags = model_of(_Plain(*shape), 12), [bag_of(5)]
    gives = "encoder: _Plain gives shape {} for patches {}; needs ({}, 12), so pool its map"
    found = re.escape(gives.format((32, *shape), (32, 3, 13, 17), 32))
    with pytest.raises(ValueError, match=found):
        select(model, bags, 2, 5, dtype=dtype)
    found = re.escape(gives.format((5, *shape), (5, 3, 13, 17), 5))
    with pytest.raises(ValueError, match=found):
        model(gather(bags, every_patch(bags), "cpu"))


def test_an_encoder_of_several_outputs_is_named() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.flatten(1)[:, :12], x

    model, bags = model_of(Pair(), 12), [bag_of(5)]
    with pytest.raises(ValueError, match=r"encoder: Pair gives a tuple; needs one tensor \(n, D\)"):
        model(gather(bags, every_patch(bags), "cpu"))
    with pytest.raises(ValueError, match="encoder: Pair gives a tuple"):
        select(model, bags, 2, 5, dtype=torch.bfloat16)


def test_without_a_known_width_embeddings_are_still_vectors() -> None:
    bags = [bag_of(5)]
    batch = gather(bags, every_patch(bags), "cpu")
    heads = {"a": nn.Sequential(nn.Linear(9, 1))}
    assert IPSModel(_Plain(9), MeanPool(1), heads)(batch)["a"].shape == (1, 1)
    with pytest.raises(ValueError, match=r"gives shape \(5, 3, 3\) .*; needs \(5, D\)"):
        IPSModel(_Plain(3, 3), MeanPool(1), heads)(batch)


def test_an_image_without_patches_is_named() -> None:
    model = tiny_model().eval()
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="mask: image 1 of 2 has no patch"):
        model(Batch(torch.rand(2, 2, 3, 9, 9), None, torch.zeros(2, 2, dtype=torch.int64), mask))


@pytest.mark.parametrize(
    ("encoder", "patches", "message"),
    [
        (TinyEncoder(12), torch.rand(2, 4, 1, 9, 9), r"patches has shape \(8, 1, 9, 9\).* needs 3 channels"),
        (TinyEncoder(12), torch.rand(2, 4, 9, 9), r"patches has shape \(8, 9, 9\).* needs \(n, C, h, w\)"),
        (TinyEncoder(12), torch.ones(2, 4, 3, 9, 9).int(), r"dtype torch.int32; needs"),
        (FeatureProjector(9, 12), torch.rand(2, 4, 8), r"patches has shape \(8, 8\).* needs features \(n, 9\)"),
    ],
)
def test_patches_that_the_encoder_cannot_take(encoder: nn.Module, patches: Tensor, message: str) -> None:
    model = IPSModel(encoder, Aggregator(12, 1, 2, 3, 3, 5), {"a": nn.Linear(12, 1)})
    with pytest.raises(ValueError, match=message):
        model(Batch(patches, None, torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)))
