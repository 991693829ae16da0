from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ips.bag import Chunk, Selection, TensorBag
from ips.network.aggregator import Aggregator
from ips.network.encoder import FeatureProjector, ResNet
from ips.network.model import IPSModel
from ips.network.official import load_official
from ips.network.positions import IndexPositions
from ips.selection.baselines import every_patch
from ips.selection.ranking import ByAttention
from ips.selection.scorer import Scorer, kept_scorer
from ips.selection.select import Mode, gather, select
from tests.ips.nets import LooseBag, bag_of, model_of, resnet_model, tiny_model
from tests.oracle import OfficialNet, exact_selection, taken_in_turns


@pytest.mark.parametrize(("n", "memory", "chunk"), [(1, 1, 1), (5, 11, 3), (67, 11, 13), (67, 67, 100), (131, 1, 1)])
@pytest.mark.parametrize("grid", [False, True])
def test_exact_is_the_definition(n: int, memory: int, chunk: int, *, grid: bool) -> None:
    model, bag = tiny_model(grid=grid), bag_of(n, grid=grid)
    rows, scores = exact_selection(model, bag.patches, bag.positions, memory)
    found = select(model, [bag], memory, chunk, attention=True)
    kept = min(n, memory)
    assert found.index[0, :kept].tolist() == rows
    assert found.mask[0].tolist() == [True] * kept + [False] * (memory - kept)
    assert found.index[0, kept:].tolist() == [-1] * (memory - kept)
    torch.testing.assert_close(found.scores[0, :kept], torch.tensor([scores[r] for r in rows]))
    assert found.scores[0, kept:].eq(0).all()
    assert found.attention is not None
    torch.testing.assert_close(found.attention[0], torch.tensor(scores))
    torch.testing.assert_close(found.attention[0].sum(), torch.tensor(1.0))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 100), st.integers(0, 10**6))
def test_exact_ignores_order_and_chunking_bit_for_bit(n: int, memory: int, chunk: int, seed: int) -> None:
    model, bag = tiny_model(grid=True), bag_of(n, seed, grid=True)
    dice = random.Random(seed)
    shuffled = LooseBag(bag, torch.randperm(n), lambda: dice.randint(1, 9))
    plain, loose = (select(model, [b], memory, chunk, attention=True) for b in (bag, shuffled))
    assert plain.attention is not None
    assert loose.attention is not None
    assert torch.equal(plain.index, loose.index)
    assert torch.equal(plain.scores, loose.scores)
    assert torch.equal(plain.attention[0], loose.attention[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("stages", "n", "h", "w", "batch"), [(2, 71, 37, 29, 32), (4, 11, 37, 29, 8), (4, 11, 67, 31, 8), (4, 11, 41, 7, 8)]
)
def test_a_resnet_logit_depends_on_its_patch_alone(
    dtype: torch.dtype, stages: Literal[2, 4], n: int, h: int, w: int, batch: int
) -> None:
    model, bag = resnet_model(stages=stages, grid=True), bag_of(n, h=h, w=w, grid=True)
    scorer = Scorer(model, dtype=dtype, batch=batch)
    first = select(model, [bag], n, n, attention=True, scorer=scorer)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    other = bag_of(9, 3, h=h, w=w, grid=True)
    second = select(model, [other, LooseBag(bag, order)], n, 7, attention=True, scorer=scorer)
    assert first.attention is not None
    assert second.attention is not None
    assert torch.equal(first.attention[0], second.attention[1])
    assert torch.equal(first.index[0], second.index[1])


def test_several_ragged_images_are_selected_as_one_by_one() -> None:
    model, bags = tiny_model(grid=True), [bag_of(n, n, grid=True) for n in (41, 3, 100, 1)]
    for mode in ("exact", "window"):
        together = select(model, bags, 10, 7, mode)
        for number, bag in enumerate(bags):
            alone = select(model, [bag], 10, 7, mode)
            assert torch.equal(together.index[number], alone.index[0])
            assert torch.equal(together.scores[number], alone.scores[0])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 100), st.integers(0, 10**6))
def test_heads_take_in_turn_whatever_order_chunk_mode_and_bag_mates(n: int, memory: int, chunk: int, seed: int) -> None:
    model, bag = tiny_model(grid=True), bag_of(n, seed, grid=True)
    dice = random.Random(seed)
    shuffled = LooseBag(bag, torch.randperm(n), lambda: dice.randint(1, 9))
    plain = select(model, [bag], memory, chunk, rank="heads", attention=True)
    loose = select(model, [bag_of(5, 1, grid=True), shuffled], memory, chunk, rank="heads", attention=True)
    window = select(model, [shuffled], memory, chunk, "window", rank="heads")
    assert torch.equal(plain.index[0], loose.index[1])
    assert torch.equal(plain.scores[0], loose.scores[1])
    assert set(window.index[0].tolist()) == set(plain.index[0].tolist())
    assert plain.attention is not None
    rows = plain.index[0][plain.mask[0]]
    assert torch.equal(plain.scores[0][plain.mask[0]], plain.attention[0][rows])  # the mean over heads, as ever


def test_heads_take_in_turn_by_the_definition() -> None:
    model, bag = tiny_model(grid=True).eval(), bag_of(67, grid=True)
    with torch.no_grad():
        logits = model.logits(model.embed(bag.patches), bag.positions)
    expected = taken_in_turns(logits.tolist(), 11)
    found = select(model, [bag], 11, 13, rank="heads")
    assert sorted(found.index[0].tolist()) == sorted(expected)
    assert found.scores[0].diff().max() <= 0
    assert set(expected) != set(select(model, [bag], 11, 13).index[0].tolist())


def test_equal_patches_and_one_logit_are_ranked_as_by_the_mean() -> None:
    patches = bag_of(1).patches.repeat(20, 1, 1, 1)
    assert select(tiny_model(), [TensorBag(patches)], 6, 7, rank="heads").index[0].tolist() == [0, 1, 2, 3, 4, 5]
    model, bag = tiny_model(tasks=1, heads=1), bag_of(83)
    assert torch.equal(select(model, [bag], 9, 4, rank="heads").index, select(model, [bag], 9, 4).index)


def test_one_rule_says_who_wins() -> None:
    with pytest.raises(ValueError, match="rank='heads' says who wins, and so does draw; leave one of them out"):
        select(tiny_model(), [bag_of(9)], 3, 4, rank="heads", draw=ByAttention(), context="rest")
    with pytest.raises(ValueError, match="rank='each' must be 'mean' or 'heads'"):
        select(tiny_model(), [bag_of(9)], 3, 4, rank="each")  # type: ignore[arg-type]


def test_equal_scores_go_to_the_smaller_row() -> None:
    patches = bag_of(1).patches.repeat(20, 1, 1, 1)
    found = select(tiny_model(), [TensorBag(patches)], 6, 7)
    assert found.index[0].tolist() == [0, 1, 2, 3, 4, 5]
    reverse = LooseBag(TensorBag(patches), torch.arange(19, -1, -1))
    assert select(tiny_model(), [reverse], 6, 7).index[0].tolist() == [0, 1, 2, 3, 4, 5]


def _twins(N: int) -> tuple[OfficialNet, IPSModel]:
    torch.manual_seed(3)
    tasks = ["majority", "max", "top", "multi"]
    official = OfficialNet(ResNet("resnet18", 2, 1), tasks, 10, H=8, D_k=16, D_v=16, D_inner=64, N=N)
    with torch.no_grad():
        official.transf.crs_attn.q.mul_(40)  # sharp attention: exact and window part ways
    trunk = ResNet("resnet18", 2, 1)
    model = IPSModel(
        trunk, Aggregator(128, 4, 8, 16, 16, 64), {t: nn.Linear(128, 10) for t in tasks}, IndexPositions(128)
    )
    load_official(model, official.state_dict())
    return official, model


@pytest.mark.parametrize(("memory", "chunk"), [(10, 10), (7, 16), (20, 3), (90, 5)])
def test_window_is_the_official_loop(memory: int, chunk: int) -> None:
    official, model = _twins(83)
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(2, 83, 1, 21, 19, generator=generator) * torch.rand(2, 83, 1, 1, 1, generator=generator)
    official.train()
    theirs = official.ips(patches, memory, chunk)
    ours = select(model, [TensorBag(image) for image in patches], memory, chunk, "window")
    for number in range(2):
        kept = ours.index[number][ours.mask[number]]
        if memory < 83:
            assert kept.tolist() == theirs[number].tolist()
        else:
            assert sorted(kept.tolist()) == theirs[number].tolist()
    if memory == 10:  # the two modes are really two
        assert select(model, [TensorBag(patches[0])], memory, chunk).index[0].tolist() != theirs[0].tolist()


def test_window_and_exact_agree_with_one_logit() -> None:
    model, bag = tiny_model(tasks=1, heads=1), bag_of(83)
    exact, window = (select(model, [bag], 9, 4, mode) for mode in ("exact", "window"))
    assert torch.equal(exact.index, window.index)


def test_window_gives_the_same_full_attention() -> None:
    model, bag = tiny_model(), bag_of(50)
    exact, window = (select(model, [bag], 9, 4, m, attention=True) for m in ("exact", "window"))
    assert exact.attention is not None
    assert window.attention is not None
    assert torch.equal(exact.attention[0], window.attention[0])


def test_bfloat16_is_close_and_not_equal() -> None:
    model, bag = resnet_model(scale=1.0), bag_of(64, h=37, w=29)
    full, half = (select(model, [bag], 64, 16, attention=True, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert full.attention is not None
    assert half.attention is not None
    assert not torch.equal(full.attention[0], half.attention[0])
    torch.testing.assert_close(full.attention[0], half.attention[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("mode", ["exact", "window"])
def test_a_float64_model_selects_in_float64(mode: Mode) -> None:
    model, bag = resnet_model(grid=True, scale=1.0).double(), bag_of(71, h=37, w=29, grid=True)
    order = torch.randperm(71, generator=torch.Generator().manual_seed(5))
    plain = select(model, [bag], 71, 71, mode, attention=True)
    loose = select(model, [LooseBag(bag, order if mode == "exact" else torch.arange(71))], 71, 7, mode, attention=True)
    assert plain.attention is not None
    assert loose.attention is not None
    assert torch.equal(plain.index, loose.index)
    assert torch.equal(plain.attention[0], loose.attention[0])
    with torch.no_grad():
        assert bag.positions is not None
        expected = model.eval().logits(model.embed(bag.patches), bag.positions).softmax(dim=0).mean(dim=1)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(plain.attention[0], expected.float(), rtol=1e-6, atol=0)
    assert plain.index[0].tolist() == expected.argsort(descending=True).tolist()


def test_a_window_refuses_rows_that_come_twice() -> None:
    bag = bag_of(9)
    with pytest.raises(ValueError, match=r"bags\[0\].chunks gave 10 rows, 9 different rows of 9"):
        select(tiny_model(), [LooseBag(bag, torch.tensor([*range(9), 4]))], 2, 3, "window")


def test_chunks_may_be_empty() -> None:
    model, bag, sizes = tiny_model(), bag_of(9), iter([0, 4, 0, 0, 5])
    found = select(model, [LooseBag(bag, torch.arange(9), lambda: next(sizes))], 4, 3)
    assert torch.equal(found.index, select(model, [bag], 4, 3).index)


def test_a_scorer_belongs_to_its_model_and_dtype() -> None:
    model, bag = tiny_model(), bag_of(9)
    with pytest.raises(ValueError, match="another model"):
        select(model, [bag], 2, 3, scorer=Scorer(tiny_model()))
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16, but the scorer given encodes in torch.float32"):
        select(model, [bag], 2, 3, scorer=Scorer(model), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bags holds no image"):
        select(model, [], 2, 3)


def test_a_scorer_is_as_good_after_an_error() -> None:
    model, bag = resnet_model(), bag_of(20, h=37, w=29)
    scorer = Scorer(model)
    with pytest.raises(OSError, match="disk on fire"):
        select(model, [_Breaks(bag.patches)], 3, 5, scorer=scorer)
    assert torch.equal(select(model, [bag], 3, 5, scorer=scorer).scores, select(model, [bag], 3, 5).scores)


def test_features_are_selected_too() -> None:
    torch.manual_seed(0)
    model = model_of(FeatureProjector(9, 12), 12, scale=20.0)
    features = torch.randn(53, 9)
    rows, _ = exact_selection(model, features, None, 8)
    bag, order = TensorBag(features), torch.randperm(53)
    found, mixed = (select(model, [b], 8, 5, attention=True) for b in (bag, LooseBag(bag, order)))
    assert found.index[0].tolist() == rows
    assert found.attention is not None
    assert mixed.attention is not None
    assert torch.equal(found.attention[0], mixed.attention[0])


def test_index_positions_follow_the_row_not_the_order() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    model.position = IndexPositions(12)
    bag = bag_of(40)
    order = torch.randperm(40)
    assert torch.equal(select(model, [bag], 9, 4).index, select(model, [LooseBag(bag, order)], 9, 4).index)
    model.position = None
    assert not torch.equal(select(model, [bag], 9, 4).index, select(_with_index_positions(), [bag], 9, 4).index)


def _with_index_positions() -> IPSModel:
    model = tiny_model()
    model.position = IndexPositions(12)
    return model


class _Breaks(TensorBag):
    def chunks(self, size: int) -> Iterator[Chunk]:
        yield from list(super().chunks(size))[:2]
        raise OSError("disk on fire")


class _Loses(TensorBag):
    def take(self, rows: Tensor) -> Chunk:
        return super().take(rows[:-1])


def _modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("model", [tiny_model(), resnet_model()], ids=["tiny", "resnet"])
def test_modes_and_statistics_survive_a_selection_and_an_error(model: IPSModel) -> None:
    model.train()
    model.encoder.get_submodule("bn" if hasattr(model.encoder, "bn") else "bn1").eval()  # a frozen part stays frozen
    modes, state = _modes(model), {name: value.clone() for name, value in model.state_dict().items()}
    bag = bag_of(20, h=37, w=29)
    select(model, [bag], 3, 5)
    assert _modes(model) == modes
    with pytest.raises(OSError, match="disk on fire"):
        select(model, [_Breaks(bag.patches)], 3, 5)
    assert _modes(model) == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def _flip(model: IPSModel) -> None:
    with torch.no_grad():
        next(model.encoder.parameters()).mul_(-1)


def _fused_step(model: IPSModel) -> None:
    """Of an optimiser whose writes autograd does not count."""
    before = next(model.encoder.parameters())._version
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert next(model.encoder.parameters())._version == before


def _load(model: IPSModel) -> None:
    model.load_state_dict({name: x * 1.5 if x.is_floating_point() else x for name, x in model.state_dict().items()})


def _train(model: IPSModel) -> None:
    """Moves the running statistics alone."""
    model.train().embed(bag_of(9, 5).patches)


def _replace(model: IPSModel) -> None:
    fresh = type(model.encoder)(*(("resnet18", 2) if isinstance(model.encoder, ResNet) else (12,)))
    model.encoder = fresh


def _queries(model: IPSModel) -> None:
    with torch.no_grad():
        model.aggregator.get_parameter("attention.queries").mul_(-1)


def _hook(model: IPSModel) -> None:
    next(model.encoder.children()).register_forward_hook(lambda _m, _i, out: -out)


def _point_elsewhere(model: IPSModel) -> None:
    parameter = next(model.encoder.parameters())
    parameter.data = -parameter.data


def _double(model: IPSModel) -> None:
    model.double()


def _past_every_count(model: IPSModel) -> None:
    """As hand-written averages of weights do it, and collectives."""
    before = next(model.encoder.parameters())._version
    for parameter in model.parameters():
        parameter.data.mul_(-1.5)
    assert next(model.encoder.parameters())._version == before


def _setting(model: IPSModel) -> None:
    for module in model.encoder.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eps = 0.5


def _forward(model: IPSModel) -> None:
    """Of one module, as tools that trace or quantise put it there."""
    module = next(model.encoder.children())
    module.forward = lambda x, given=module.forward: -given(x)


CHANGES = [_flip, _fused_step, _load, _train, _replace, _queries, _hook, _point_elsewhere, _double, _past_every_count]
CHANGES += [_setting, _forward]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [tiny_model, resnet_model])
@pytest.mark.parametrize("given", [True, False])
def test_a_reused_scorer_is_as_fresh_as_its_model(
    change: Callable[[IPSModel], None],
    make: Callable[[], IPSModel],
    given: bool,  # noqa: FBT001
) -> None:
    model, bags = make(), [bag_of(12)]
    scorer = Scorer(model) if given else None
    before = select(model, bags, 5, 9, scorer=scorer)
    change(model)
    found = select(model, bags, 5, 9, scorer=scorer)
    fresh = select(model, bags, 5, 9, scorer=Scorer(model))
    assert torch.equal(found.index, fresh.index)
    assert torch.equal(found.scores, fresh.scores)
    assert not torch.equal(found.scores, before.scores)


def test_a_model_keeps_one_copy_of_its_encoder_and_lets_it_go() -> None:
    model, bags = resnet_model(), [bag_of(9)]
    with mock.patch.object(Scorer, "_build", autospec=True, side_effect=Scorer._build) as built:
        for _ in range(3):
            select(model, bags, 5, 9)
            select(model, bags, 5, 9, dtype=torch.bfloat16, certify=True)
    count = built.call_count
    built.reset_mock()  # it holds what it was called with
    assert count == 2  # float32, which certifies too, and bfloat16
    scorer = weakref.ref(kept_scorer(model, None))
    assert len(copy.deepcopy(model).state_dict()) == len(model.state_dict())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert scorer() is None


@pytest.mark.parametrize("make", [tiny_model, resnet_model])
def test_a_model_that_its_encoder_knows_is_let_go(make: Callable[[], IPSModel]) -> None:
    model, bags = make(), [bag_of(9)]
    next(model.encoder.children()).register_forward_hook(lambda _m, _i, out, owner=model: out)
    select(model, bags, 5, 9)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_copy_of_a_model_selects_with_its_own_weights() -> None:
    model, bags = resnet_model(), [bag_of(9)]
    before = select(model, bags, 5, 9)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(select(copied, bags, 5, 9).scores, before.scores)
        assert copied.kept.keys() == model.kept.keys()
        assert not set(map(id, copied.kept.values())) & set(map(id, model.kept.values()))
        _flip(copied)
        assert not torch.equal(select(copied, bags, 5, 9).scores, before.scores)
    assert torch.equal(select(model, bags, 5, 9).scores, before.scores)


def test_a_selection_that_could_not_copy_leaves_nothing_behind() -> None:
    model, bags = resnet_model(), [bag_of(9)]
    before = select(model, bags, 5, 9)
    conv = model.encoder.get_submodule("conv1")
    weight = conv._parameters["weight"]
    conv._parameters["weight"] = weight * 1  # type: ignore[assignment, operator]  # as `torch.func.functional_call` leaves it
    with pytest.raises(RuntimeError, match="deepcopy"):
        select(model, bags, 5, 9)
    conv._parameters["weight"] = weight
    assert torch.equal(select(model, bags, 5, 9).scores, before.scores)
    assert not isinstance(kept_scorer(model, None)._encoder.get_submodule("bn1"), nn.BatchNorm2d)


def test_a_wrapped_model_selects_as_it_does_alone(group_of_one: dist.ProcessGroup) -> None:
    model, bags = tiny_model(), [bag_of(30)]
    alone = select(model, bags, 5, 9)
    wrappers: tuple[Any, ...] = (
        DistributedDataParallel(model, process_group=group_of_one),
        torch.compile(model, backend="eager"),
        AveragedModel(model),
    )
    for wrapped in wrappers:
        assert torch.equal(select(wrapped, bags, 5, 9).scores, alone.scores)
        scorer = Scorer(wrapped)
        assert torch.equal(select(wrapped, bags, 5, 9, scorer=scorer).scores, alone.scores)


def test_each_head_and_task_has_its_attention() -> None:
    model, bag = tiny_model(tasks=2, heads=3).eval(), bag_of(23)
    with torch.no_grad():
        expected = model.logits(model.embed(bag.patches), None).view(23, 3, 2).softmax(dim=0)
    for mode in ("exact", "window"):
        found = select(model, [bag, bag_of(4)], 5, 7, mode, attention="each").attention
        assert found is not None
        assert [tuple(one.shape) for one in found] == [(23, 3, 2), (4, 3, 2)]
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="attention='heads' must be False, True or 'each'"):
        select(model, [bag], 5, 7, attention="heads")  # type: ignore[arg-type]


def test_scores_say_over_how_many_patches_they_are() -> None:
    model, bags = tiny_model(), [bag_of(23), bag_of(4)]
    exact, window = (select(model, bags, 5, 7, mode, attention=True) for mode in ("exact", "window"))
    for found, scored in ((exact, [23, 4]), (window, [9, 4])):  # 5 stay of 12, then 7 come, then 4
        assert found.scored is not None
        assert found.scored.tolist() == scored
        assert found.attention is not None
        whole = torch.allclose(found.scores[0], found.attention[0][found.index[0]])
        assert whole == (found is exact)
    assert every_patch(bags).scored.tolist() == [23, 4]  # type: ignore[union-attr]


def test_gather_takes_the_winners_and_pads() -> None:
    model, bags = tiny_model(grid=True), [bag_of(n, n, grid=True) for n in (23, 4)]
    selection = select(model, bags, 6, 5)
    batch = gather(bags, selection, "cpu")
    assert batch.patches.shape == (2, 6, 3, 13, 17)
    assert batch.patches.dtype == torch.uint8
    assert torch.equal(batch.patches[0], bags[0].patches[selection.index[0]])
    assert torch.equal(batch.patches[1, :4], bags[1].patches[selection.index[1, :4]])
    assert batch.patches[1, 4:].eq(0).all()
    assert batch.positions is not None
    assert bags[0].positions is not None
    assert torch.equal(batch.positions[0], bags[0].positions[selection.index[0]])
    assert torch.equal(batch.mask, selection.mask)
    assert gather([bag_of(23), bag_of(4)], selection, "cpu").positions is None
    with pytest.raises(ValueError, match=r"bags has 1 images, the selection 2"):
        gather(bags[:1], selection, "cpu")
    with pytest.raises(ValueError, match=r"bags\[1\]: patches has shape \(4, 3, 11, 17\).*one shape and one dtype"):
        gather([bags[0], bag_of(4, h=11)], selection, "cpu")
    with pytest.raises(ValueError, match=r"bags\[1\]: .*torch.float32; .*torch.uint8"):
        gather([bags[0], TensorBag(bags[1].patches / 255)], selection, "cpu")
    broken = TensorBag(torch.rand(23, 4).index_fill(0, selection.index[0, 2:3], torch.nan))
    with pytest.raises(ValueError, match=rf"bags\[0\]: patches: row {selection.index[0, 2]} holds NaN"):
        gather([broken, TensorBag(torch.rand(4, 4))], selection, "cpu")
    with pytest.raises(ValueError, match=r"bags\[1\].take gave 3 patches for 4 rows"):
        gather([bags[0], _Loses(bags[1].patches)], selection, "cpu")


class _Elsewhere(TensorBag):
    def take(self, rows: Tensor) -> Chunk:
        chunk = super().take(rows)
        return Chunk(chunk.patches, chunk.index, torch.zeros(len(rows), 3))


def test_gather_refuses_other_rows_and_bad_positions() -> None:
    model, bags = tiny_model(), [bag_of(4, grid=True), bag_of(9, grid=True)]
    selection = select(model, bags, 9, 5)
    with pytest.raises(ValueError, match=r"bags\[1\]: rows 0 to 8 are asked for, but it has 0..3; .* in this order\?"):
        gather(bags[::-1], selection, "cpu")
    wrong = Selection(selection.index, torch.ones(2, 9, dtype=torch.bool), selection.scores)
    with pytest.raises(ValueError, match=r"bags\[0\]: rows -1 to 3 are asked for"):
        gather(bags, wrong, "cpu")
    reverse = _Reverses(bags[1].patches)
    first = selection.index[1]
    with pytest.raises(ValueError, match=rf"bags\[1\].take gave row {first[-1]} where row {first[0]} was asked for"):
        gather([bags[0], reverse], selection, "cpu")
    with pytest.raises(ValueError, match=r"bags\[1\]: positions has shape \(9, 3\); needs \(9, 2\)"):
        gather([bags[0], _Elsewhere(bags[1].patches)], selection, "cpu")
    with pytest.raises(ValueError, match=r"bags\[1\]: positions reach from nan to nan; they must be finite"):
        gather([bags[0], TensorBag(bags[1].patches, torch.full((9, 2), torch.nan))], selection, "cpu")


class _Reverses(TensorBag):
    def take(self, rows: Tensor) -> Chunk:
        return super().take(rows.flip(0))


def test_rows_that_never_come_are_counted() -> None:
    bag = bag_of(9)
    with pytest.raises(ValueError, match=r"bags\[0\].chunks gave 5 rows, 4 different rows of 9"):
        select(tiny_model(), [LooseBag(bag, torch.tensor([0, 1, 2, 2, 8]))], 2, 3)


@pytest.mark.parametrize(
    ("memory", "chunk", "mode", "message"),
    [
        (0, 1, "exact", "memory=0 must be"),
        (2.5, 1, "exact", r"memory=2\.5 must be a whole number"),
        (1, 0, "exact", "chunk=0 must be"),
        (1, 2.5, "exact", r"chunk=2\.5 must be a whole number"),
        (1, 1, "fast", "mode='fast' must be"),
    ],
)
def test_bad_arguments_are_named(memory: int, chunk: int, mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(tiny_model(), [bag_of(3)], memory, chunk, mode)  # type: ignore[arg-type]
