"""Contexts through bags, selections and losses: the answer of all N patches, whatever M is."""

from __future__ import annotations

import copy
import random
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from ips.bag import Bag, Batch, Chunk, Context, Selection, TensorBag
from ips.learning.gradient import bounded_backward
from ips.network.aggregator import Aggregator
from ips.network.encoder import FeatureProjector
from ips.network.heads import linear_head
from ips.network.model import IPSModel, evaluating
from ips.network.pooling import MeanPool
from ips.selection.baselines import HalfByScore, RandomDraw, every_patch
from ips.selection.pools import Draw
from ips.selection.predict import predict
from ips.selection.ranking import ByAttention, Rank
from ips.selection.scorer import Scorer
from ips.selection.select import Mode, gather, select
from tests.gloo import one_of_two
from tests.ips.nets import LooseBag, bag_of, model_of, resnet_model, tiny_model
from tests.oracle import full_attention

Outputs = dict[str, Tensor]


def _embedded(model: IPSModel, bag: TensorBag) -> Tensor:
    x = model.embed(bag.patches)
    if model.position is not None:
        assert bag.positions is not None
        x = x + model.position(bag.positions)
    return x


def _full(model: IPSModel, bags: list[TensorBag]) -> Outputs:
    """Full attention over each image, with a graph, in evaluation mode."""
    found = [full_attention(model, _embedded(model, bag)) for bag in bags]
    return {task: torch.stack([one[task] for one in found]) for task in model.tasks}


def _close(found: Outputs, wanted: Outputs, tolerance: float) -> None:
    for task, logits in wanted.items():
        torch.testing.assert_close(found[task], logits, rtol=tolerance, atol=tolerance)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 45),
    st.integers(1, 30),
    st.sampled_from(["exact", "window"]),
    st.sampled_from(["mean", "heads"]),
    st.sampled_from([0.1, 20.0, 500.0]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_evaluation_is_full_attention_for_any_memory_order_and_chunking(
    lengths: list[int],
    memory: int,
    chunk: int,
    mode: Mode,
    rank: Rank,
    scale: float,
    grid: bool,  # noqa: FBT001
    seed: int,
) -> None:
    """By the sums of all, and by winners and rest; in float64 to 1e-10, in float32 to 1e-4."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = tiny_model(grid=grid, scale=scale, seed=seed).to(dtype).eval()
        whole = [bag_of(n, seed + n, grid=grid) for n in lengths]
        bags = [LooseBag(bag, torch.randperm(len(bag)), partial(random.Random(seed).randint, 1, 9)) for bag in whole]
        with torch.no_grad():
            wanted = _full(model, whole)
            found = select(model, bags, memory, chunk, mode, context="whole")
            assert found.whole is not None
            _close(model.recall(found.whole), wanted, tolerance)
            found = select(model, bags, memory, chunk, mode, context="rest", rank=rank)
            assert found.whole is None
            _close(model(gather(bags, found, "cpu")), wanted, tolerance)


def test_equal_patches_and_any_number_of_winners_change_no_bit() -> None:
    patches = bag_of(7, 3).patches[torch.randint(0, 7, (40,), generator=torch.Generator().manual_seed(0))]
    patches[::5] = 9
    model, bag = tiny_model().eval(), TensorBag(patches)
    answers = [
        select(model, [bag], memory, 8, context="whole", scorer=Scorer(model, dedupe=dedupe)).whole
        for memory, dedupe in ((1, True), (40, True), (6, False))
    ]
    for found in answers:
        assert found is not None
        assert torch.equal(found.mean, answers[0].mean)  # type: ignore[union-attr]
        assert torch.equal(found.log_mass, answers[0].log_mass)  # type: ignore[union-attr]


@pytest.mark.parametrize("share", [1e-3, 1e-6, 1e-9])
def test_a_rest_of_little_weight_keeps_its_digits(share: float) -> None:
    """Two winners hold nearly all the attention: nothing cancels."""
    model = IPSModel(FeatureProjector(5, 12), tiny_model().aggregator, {"a": nn.Linear(12, 1), "b": nn.Linear(12, 2)})
    model = model.double().eval()
    bag = TensorBag(torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        logits = model.logits(model.embed(bag.patches), None)
        top = logits.topk(2, dim=0).values
        model.aggregator.attention.queries.mul_(-torch.tensor(share).log() / (top[0] - top[1]).max())  # type: ignore[operator, union-attr]
    _gradients_agree(model, [bag], 2, 1e-9)


def _loss(outputs: Outputs) -> Tensor:
    return torch.stack([logits.square().mean() + logits.sum() for logits in outputs.values()]).sum()


def _gradients_agree(
    model: IPSModel, bags: list[TensorBag], memory: int, tolerance: float, draw: Draw | None = None
) -> None:
    """The aggregator's and the heads' gradient is that of all patches; the encoder's is that through the winners.

    Where they are drawn with weights, of each so many times.
    """
    full, bounded = copy.deepcopy(model), copy.deepcopy(model)
    model.zero_grad()
    selection = select(model, bags, memory, 5, context="rest", draw=draw)
    weights = selection.mask.double() if selection.weights is None else selection.weights.double()
    _loss(model(gather(bags, selection, "cpu"))).backward()  # type: ignore[no-untyped-call]
    bounded_backward(bounded, bags, selection, _loss, 3)
    with torch.no_grad():
        constants = [_embedded(full, bag) for bag in bags]
    won: list[Outputs] = []
    for number, bag in enumerate(bags):
        through = torch.zeros(len(bag), 1, dtype=torch.float64)
        through[selection.index[number][selection.mask[number]], 0] = weights[number][selection.mask[number]]
        x = constants[number] + through * (_embedded(full, bag) - constants[number])
        won.append(full_attention(full, x))
    _loss({task: torch.stack([one[task] for one in won]) for task in full.tasks}).backward()  # type: ignore[no-untyped-call]
    for (name, p), q, r in zip(model.named_parameters(), full.parameters(), bounded.parameters(), strict=True):
        assert q.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance, msg=name)
        torch.testing.assert_close(r.grad, q.grad, rtol=tolerance, atol=tolerance, msg=name)


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 30), st.sampled_from([1.0, 20.0]), st.booleans(), st.integers(0, 10**6))
def test_the_attention_learns_from_all_patches(memory: int, scale: float, grid: bool, seed: int) -> None:  # noqa: FBT001
    model = tiny_model(grid=grid, scale=scale, seed=seed).double().eval()
    bags = [bag_of(n, seed + n, grid=grid) for n in (23, 3, 11)]
    for draw in (None, ByAttention(seed)):
        _gradients_agree(model, bags, memory, 1e-8, draw)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_the_mean_over_draws_is_the_encoders_gradient_of_the_full_model(scale: float) -> None:
    """Within two standard errors of all numbers; the best alone are off by a tenth of the gradient and more."""
    model, bags = tiny_model(scale=scale).double().eval(), [bag_of(23, 3), bag_of(7, 4)]
    parts = [p for p in model.encoder.parameters() if p.requires_grad]

    def gradient(outputs: Outputs) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(_loss(outputs), parts)])

    def bounded(draw: Draw | None) -> Tensor:
        return gradient(model(gather(bags, select(model, bags, 4, 30, context="rest", draw=draw), "cpu")))

    wanted = gradient(_full(model, bags))
    draws = torch.stack([bounded(ByAttention(turn)) for turn in range(300)])
    error = draws.std(dim=0) / 300**0.5
    assert (draws.mean(dim=0) - wanted).norm() < 2 * error.norm()
    assert error.norm() < 0.1 * wanted.norm()
    assert (bounded(None) - wanted).norm() > 0.1 * wanted.norm()


def test_with_all_patches_as_winners_it_is_the_full_models_gradient() -> None:
    model = resnet_model(scale=20.0).double().eval()
    full, bags = copy.deepcopy(model), [bag_of(n, n, h=37, w=29) for n in (9, 4)]
    _loss(model(gather(bags, select(model, bags, 9, 4, context="rest"), "cpu"))).backward()  # type: ignore[no-untyped-call]
    _loss(_full(full, bags)).backward()  # type: ignore[no-untyped-call]
    for (name, p), q in zip(model.named_parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-8, msg=name)


def test_a_frozen_encoder_needs_no_winner_at_all() -> None:
    """The rest of no winner is the whole; what is trained gets the gradient of full attention."""
    model = tiny_model(scale=20.0).double().eval()
    model.encoder.requires_grad_(False)
    full, bags = copy.deepcopy(model), [bag_of(n, n) for n in (9, 4)]
    nobody = select(
        model, bags, 3, 4, context="rest", draw=lambda _keys, _memory: torch.empty(0, dtype=torch.int64)
    ).rest
    assert nobody is not None
    _loss(model.recall(nobody)).backward()  # type: ignore[no-untyped-call]
    _loss(_full(full, bags)).backward()  # type: ignore[no-untyped-call]
    for (name, p), q in zip(model.named_parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_dropout_of_the_attention_passes_by_the_rest() -> None:
    model, bag = tiny_model(scale=1.0).double(), bag_of(400)
    model.eval()
    model.aggregator.get_submodule("attention.dropout").train()
    selection = select(model, [bag], 3, 64, context="rest")
    batch = gather([bag], selection, "cpu")
    with torch.no_grad():
        wanted = _full(model.eval(), [bag])
        model.aggregator.get_submodule("attention.dropout").train()
        found = [model(batch)["task.1"] for _ in range(20)]
    assert max(float((one - wanted["task.1"]).abs().max()) for one in found) < 0.05
    assert any(not torch.equal(one, found[0]) for one in found)


def test_bfloat16_scoring_and_certificates_go_with_it() -> None:
    """The sums are those of the low-precision pass: 2% of the outputs' range; certificates mend the winners alone."""
    model, bags = resnet_model(scale=20.0).eval(), [bag_of(40, h=37, w=29)]
    with torch.no_grad():
        wanted = _full(model, bags)
        for certify in (False, True):
            found = select(model, bags, 6, 8, dtype=torch.bfloat16, certify=certify, context="rest")
            batch = model(gather(bags, found, "cpu"))
            for task, logits in wanted.items():
                torch.testing.assert_close(batch[task], logits, rtol=0.05, atol=0.05)
                assert not torch.equal(batch[task], logits)


def test_what_is_pooled_beside_random_patches_is_the_others() -> None:
    model, bags = tiny_model().double().eval(), [bag_of(23), bag_of(3)]
    for draw in (RandomDraw(torch.Generator().manual_seed(0)), HalfByScore(torch.Generator().manual_seed(0))):
        found = select(model, bags, 6, 8, context="rest", draw=draw)
        assert found.mask.sum(dim=1).tolist() == [6, 3]
        with torch.no_grad():
            _close(model(gather(bags, found, "cpu")), _full(model, bags), 1e-10)


def test_winners_of_all_images_fill_the_batches_of_the_second_pass() -> None:
    """11 images of 3 winners are 33 more patches, 5 batches of 8; an image at a time they would be 11."""
    model, bags = tiny_model().eval(), [bag_of(9, n) for n in range(11)]
    batches: list[int] = []
    model.encoder.register_forward_hook(lambda _module, args, _out: batches.append(len(args[0])))
    for context, count in ((None, 13), ("whole", 13), ("rest", 13 + 5)):
        batches.clear()
        select(model, bags, 3, 4, context=context, scorer=Scorer(model, batch=8))  # type: ignore[arg-type]
        assert batches == [8] * count


@pytest.mark.parametrize("mode", ["exact", "window"])
def test_a_bag_that_gives_other_patches_the_second_time_is_named(mode: Mode) -> None:
    """Silent, the sums would be less what they never held."""
    model, bags = tiny_model().eval(), [bag_of(9), _Fickle(bag_of(30).patches)]
    select(model, bags, 4, 5, mode, context="whole")
    with pytest.raises(ValueError, match=r"bags\[1\]\.take gave another patch of row \d+ than the pass over all"):
        select(model, bags, 4, 5, mode, context="rest")


class _Fickle(TensorBag):
    """Turned half round where it is taken."""

    def take(self, rows: Tensor) -> Chunk:
        return Chunk(self.patches[rows].flip(2, 3), rows)


def test_predict_with_context_is_full_attention_and_encodes_nothing_twice() -> None:
    torch.manual_seed(0)
    parts = resnet_model(grid=True)
    model = IPSModel(
        parts.encoder,
        parts.aggregator,
        {n: linear_head("binary", 128, 2) for n in "ab"},
        parts.position,
    )
    bags: list[Bag] = [_Untaken(*vars(bag_of(n, n, h=37, w=29, grid=True)).values()) for n in (23, 4)]
    found = [predict(model, bags, memory, 5, context=True).probabilities for memory in (1, 7, 30)]
    with torch.no_grad(), evaluating(model):
        plain = [bag_of(n, n, h=37, w=29, grid=True) for n in (23, 4)]
        wanted = model(gather(plain, every_patch(plain), "cpu"))
    for task, logits in wanted.items():
        assert torch.equal(found[0][task], found[1][task])
        assert torch.equal(found[0][task], found[2][task])
        torch.testing.assert_close(found[0][task][:, 1:], logits.sigmoid(), rtol=1e-4, atol=1e-5)


class _Untaken(TensorBag):
    def take(self, rows: Tensor) -> Chunk:
        raise AssertionError("encoded in the pass already")


def _worker(rank: int, folder: str) -> None:
    with one_of_two(rank, folder):
        bags = [bag_of(n, n, grid=True) for n in (67, 1, 20)]
        torch.save([_shared(bags, kind, dist.group.WORLD) for kind in ("whole", "rest")], f"{folder}/{rank}.pt")


def _shared(bags: list[TensorBag], kind: str, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    model = tiny_model(grid=True).double().eval()
    found = select(model, bags, 9, 5, context=kind, group=group, values=True)  # type: ignore[arg-type]
    context = found.whole if kind == "whole" else found.rest
    assert context is not None
    assert found.values is not None
    parts = (context.log_mass, context.mean, *(() if context.second is None else (context.second,)))
    return (*parts, *(one.values for one in found.values), *(one.logits for one in found.values))


@pytest.mark.slow
def test_two_processes_give_the_sums_of_one(tmp_path: Path) -> None:
    spawn(_worker, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    bags = [bag_of(n, n, grid=True) for n in (67, 1, 20)]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for kind, one, other in zip(("whole", "rest"), first, second, strict=True):
        alone = _shared(bags, kind, None)
        assert len(alone) == len(one) == (8 if kind == "whole" else 9)
        for a, b, c in zip(alone, one, other, strict=True):
            assert torch.equal(b, c)
            torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12)


def test_a_group_of_one_gives_the_context_of_none(group_of_one: dist.ProcessGroup) -> None:
    bags = [bag_of(9, grid=True), bag_of(1, grid=True)]
    for kind in ("whole", "rest"):
        for a, b in zip(_shared(bags, kind, group_of_one), _shared(bags, kind, None), strict=True):
            assert torch.equal(a, b)


def test_what_has_no_such_pool_is_refused() -> None:
    model, bags = tiny_model(), [bag_of(5)]
    with pytest.raises(ValueError, match="context='some' must be None, 'whole' or 'rest'"):
        select(model, bags, 2, 3, context="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="certify, group and draw need mode='exact'"):
        select(model, bags, 2, 3, "window", draw=RandomDraw(torch.Generator()))
    selection = select(model, bags, 2, 3, context="rest")
    model.aggregator = _OwnScores(12)
    for kwargs in ({"context": "whole"}, {"values": True}):
        with pytest.raises(ValueError, match="_OwnScores cannot pool patches that it does not see; context needs Agg"):
            select(model, bags, 2, 3, **kwargs)
    with pytest.raises(ValueError, match="_OwnScores cannot pool"):
        model(gather(bags, selection, "cpu"))
    model.encoder.bn = nn.BatchNorm1d(12, track_running_stats=False)
    with pytest.raises(ValueError, match="without running statistics, which makes an embedding depend on its batch"):
        select(model, bags, 2, 3, context="whole")


def test_an_aggregator_that_pools_in_a_way_of_its_own_is_refused_too() -> None:
    """By the sums it would be passed by: full attention without its temperature."""
    model, bags = tiny_model(), [bag_of(5)]
    model.aggregator = _Cooler(12, 2, 3, 5, 7, 11)
    for kwargs in ({"context": "whole"}, {"context": "rest"}, {"values": True}):
        with pytest.raises(ValueError, match="_Cooler cannot pool patches that it does not see; context needs Aggreg"):
            select(model, bags, 2, 3, **kwargs)
    assert select(model, bags, 2, 3).whole is None


class _Cooler(Aggregator):
    def forward(self, x: Tensor, mask: Tensor, rest: Context | None = None) -> Tensor:
        return super().forward(2 * x, mask, rest)


class _OwnScores(MeanPool):
    def __init__(self, dim: int) -> None:
        super().__init__(2)
        self.query = nn.Parameter(torch.randn(1, dim))

    def folded(self) -> Tensor:
        return self.query


def test_a_batch_travels_with_its_rest() -> None:
    model, bags = tiny_model().eval(), [bag_of(9), bag_of(3)]
    selection = select(model, bags, 4, 5, context="rest")
    batch = gather(bags, selection, "cpu")
    moved = batch.to("cpu")
    assert isinstance(moved.rest, Context)
    leaves, spec = torch.utils._pytree.tree_flatten(batch)
    assert len(leaves) == 5 + 3  # positions, which are None, are one
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, Batch)
    _close(model(again), model(batch), 0.0)
    drawn = gather(bags, select(model, bags, 4, 5, context="rest", draw=ByAttention()), "cpu")
    leaves, spec = torch.utils._pytree.tree_flatten(drawn)
    assert len(leaves) == 5 + 3 + 1
    back = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert back.weights is drawn.weights
    assert back.rest.mean is drawn.rest.mean  # type: ignore[union-attr]
    plain = gather(bags, Selection(selection.index, selection.mask, selection.scores), "cpu")
    assert plain.rest is None
    assert torch.utils._pytree.tree_unflatten(*torch.utils._pytree.tree_flatten(plain)).rest is None


@pytest.mark.slow
def test_models_with_a_rest_compile_whole_and_export() -> None:
    model, bags = tiny_model().eval(), [bag_of(9), bag_of(3)]
    batch = gather(bags, select(model, bags, 4, 5, context="rest", draw=ByAttention()), "cpu")
    wanted = model(batch)
    _close(torch.compile(model, fullgraph=True, backend="eager")(batch), wanted, 1e-6)
    _close(torch.export.export(model, (batch,)).module()(batch), wanted, 1e-6)


def test_features_too() -> None:
    model = model_of(FeatureProjector(9, 12), 12).double().eval()
    bags = [TensorBag(torch.randn(n, 9, dtype=torch.float64)) for n in (30, 2)]
    _gradients_agree(model, bags, 4, 1e-8)
