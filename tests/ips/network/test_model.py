from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ips.bag import Batch
from ips.network.aggregator import Aggregator
from ips.network.encoder import FeatureProjector
from ips.network.heads import linear_head
from ips.network.model import IPSModel, unwrapped
from ips.network.part import PatchEncoder, Positions
from ips.network.pooling import GatedAttention, MeanPool
from ips.network.positions import GridPositions, IndexPositions
from ips.selection.baselines import every_patch
from ips.selection.select import gather, select
from tests.ips.nets import TinyEncoder, bag_of, model_of, resnet_model, tiny_model


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
    torch.testing.assert_close(out["task.1"], model.heads["task.1"](tokens[:, 1]))


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


class _Own(nn.Module):
    """An encoder of somebody's, in which names mean something else."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.channels, self.inputs = 1, 24, ("rgb",)
        self.conv = nn.Conv2d(3, self.channels, 3)
        self.linear = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.conv(x).mean(dim=(2, 3)))
        return out


def test_attributes_of_a_users_parts_are_not_read() -> None:
    class Softmax(MeanPool):
        dim = 1

    class Head(nn.Module):
        in_features = 5

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :1]

    class Places(nn.Module):
        dim, limit = 2, 3

        def forward(self, positions: Tensor) -> Tensor:
            return positions.sum(dim=-1, keepdim=True)

    bags = [bag_of(5, grid=True)]
    assert model_of(_Own(), 12)(gather(bags, every_patch(bags), "cpu"))["task.1"].shape == (1, 2)
    model = IPSModel(_Own(), Softmax(1), {"a": Head()}, Places())
    assert model(gather(bags, every_patch(bags), "cpu"))["a"].shape == (1, 1)


def test_what_an_encoder_declares_is_held_to() -> None:
    class Declared(PatchEncoder, _Own):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.dim, self.channels, self.inputs = 12, 3, None

    with pytest.raises(ValueError, match="the encoder needs 3 channels"):
        model_of(Declared(), 12).check_patches(torch.rand(2, 4, 9, 9))
    with pytest.raises(ValueError, match="need one width D, found .*'encoder': 12, 'aggregator': 16"):
        model_of(Declared(), 16)


def test_positions_of_ones_own_may_read_the_index_and_have_a_limit() -> None:
    class Early(Positions):
        def __init__(self, *, reads_index: bool) -> None:
            super().__init__()
            self.dim, self.limit, self.reads_index = 12, 50, reads_index

        def forward(self, places: Tensor) -> Tensor:
            return places.new_zeros(*places.shape[: 2 if self.reads_index else -1], 12).float()

    bags = [bag_of(9, grid=True)]
    for reads_index in (True, False):
        model = tiny_model()
        model.position = Early(reads_index=reads_index)
        if reads_index:
            model(gather(bags, every_patch(bags), "cpu"))
        else:
            with pytest.raises(ValueError, match=r"they must be finite, >= 0 and < 50"):
                model(gather(bags, every_patch(bags), "cpu"))


def test_an_aggregator_of_ones_own_can_select() -> None:
    class First(MeanPool):
        def folded(self) -> Tensor:
            return torch.eye(12)[:2]

    model, bag = IPSModel(TinyEncoder(12), First(2), {"a": nn.Linear(12, 1), "b": nn.Linear(12, 1)}).eval(), bag_of(9)
    logits = model.embed(bag.patches)[:, :2]
    expected = logits.softmax(dim=0).mean(dim=1).argsort(descending=True)[:3]
    assert torch.equal(select(model, [bag], 3, 4).index[0], expected)


def test_a_part_wrapped_for_several_processes_is_refused(group_of_one: dist.ProcessGroup) -> None:
    encoder = DistributedDataParallel(TinyEncoder(12), process_group=group_of_one)
    with pytest.raises(ValueError, match="encoder is a DistributedDataParallel, .* wrap the whole model instead"):
        model_of(encoder, 12)


def test_patches_in_place_of_a_batch_get_advice() -> None:
    with pytest.raises(TypeError, match=r"batch is a Tensor; .*`gather\(bags, select\(.* TensorBag\(patches\)"):
        tiny_model()(bag_of(5).patches)


def test_heads_that_say_their_kinds_say_it_to_the_loss() -> None:
    heads = {"er": linear_head("binary", 12, 2), "grade": linear_head("multiclass", 12, 3), "x": nn.Linear(12, 1)}
    assert IPSModel(TinyEncoder(12), MeanPool(3), heads).kinds == {"er": "binary", "grade": "multiclass"}


def _batch(model: IPSModel, *sizes: int) -> Batch:
    bags = [bag_of(n, n, h=37, w=29, grid=True) for n in sizes]
    return gather(bags, select(model, bags, 5, 4), "cpu")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize(
    "make", [tiny_model, partial(tiny_model, grid=True), resnet_model], ids=["tiny", "grid", "res"]
)
def test_the_model_is_one_graph(make: Callable[[], IPSModel]) -> None:
    """For bags longer and shorter than M."""
    model = make().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for sizes in ((9, 8), (3, 8)):
        batch = _batch(model, *sizes)
        for task, logits in compiled(batch).items():
            torch.testing.assert_close(logits, model(batch)[task])
    compiled(batch)["task.1"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # torch's own
def test_the_model_is_exported_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model(grid=True).eval()
    batch = _batch(model, 9, 8)
    torch.export.save(torch.export.export(model, (batch,)), tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(_batch(model, 7, 6))
    assert all(torch.equal(logits, found[task]) for task, logits in model(_batch(model, 7, 6)).items())


def test_the_model_inside_is_found(group_of_one: dist.ProcessGroup) -> None:
    model = tiny_model()
    inner = AveragedModel(model)
    assert unwrapped(inner) is inner.module
    wrapped: Any = torch.compile(DistributedDataParallel(tiny_model(), process_group=group_of_one), backend="eager")
    assert unwrapped(model) is model
    assert isinstance(unwrapped(wrapped), IPSModel)
    with pytest.raises(ValueError, match="model is a Linear; needs an IPSModel"):
        unwrapped(nn.Linear(3, 3))


def test_a_model_in_parts_is_refused(group_of_one: dist.ProcessGroup) -> None:
    mesh = DeviceMesh.from_group(group_of_one, "cpu")
    with pytest.raises(ValueError, match="holds a part of its weights"):
        unwrapped(fully_shard(tiny_model(), mesh=mesh))  # type: ignore[arg-type]


def _with(position: nn.Module | None, heads: int, seed: int) -> IPSModel:
    """Whose weights are of one shape whatever `heads`."""
    torch.manual_seed(seed)
    aggregator = Aggregator(12, 2, heads, key_dim=12 // heads, value_dim=12 // heads, hidden_dim=5)
    return IPSModel(TinyEncoder(12), aggregator, {"er": nn.Linear(12, 1), "pr": nn.Linear(12, 1)}, position)


@pytest.mark.parametrize(
    ("position", "heads", "message"),
    [
        (GridPositions(12), 4, r"heads_by_key_by_value.*\[3, 4, 4, 0\].*\[4, 3, 3, 0\]"),
        (IndexPositions(12), 3, 'Missing.*position.index.*\n.*Unexpected.*position.grid"'),
        (None, 3, 'Unexpected.*position.grid"'),
    ],
)
def test_weights_for_another_attention_or_position_do_not_load(
    position: nn.Module | None, heads: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        _with(position, heads, 1).load_state_dict(_with(GridPositions(12), 3, 0).state_dict())


def test_weights_of_an_earlier_version_load_where_they_are_known_to_fit() -> None:
    saved, model = (_with(GridPositions(12), 3, seed) for seed in (0, 1))
    state = {re.sub(r"^heads\.(\d):\w+", r"heads.\1", n): x for n, x in saved.state_dict().items() if x.numel()}
    with pytest.raises(RuntimeError, match=r"are \['er', 'pr'\] in this order, load model.named"):
        model.load_state_dict(state)
    model.load_state_dict(model.named(state))
    assert all(torch.equal(x, saved.state_dict()[name]) for name, x in model.state_dict().items())
    other = _with(IndexPositions(12), 3, 1)
    with pytest.raises(RuntimeError, match="position.grid"):  # what says what it is, is believed
        other.load_state_dict(other.named(saved.state_dict()))
