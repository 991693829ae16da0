"""The loop under every regime that the config can ask for."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from ips.bag import Bag, Chunk, Context, TensorBag
from ips.learning.schedule import parameter_groups
from ips.network.aggregator import Aggregator
from ips.network.model import IPSModel
from ips.selection.select import select
from pipeline.config.model import SelectConfig, TrainConfig
from pipeline.errors import StageError
from pipeline.training.hands import Slides
from pipeline.training.loop import _Turn, train_steps
from pipeline.training.ranks import Ranks
from tests.pipeline.training.test_loop import SELECT, TinyEncoder, _bags, _model, _open, _optimizer, _slides

_STEP = {"epochs": 1, "batch_size": 11, "warmup_epochs": 0, "clip_norm": None, "lr": 1e-3}


def _fix(module: nn.BatchNorm2d) -> None:
    """Evaluation mode for good."""
    module.eval()
    module.train = lambda mode=True: module  # type: ignore[method-assign]


def _stepped(
    changes: dict[str, object],
    *,
    fixed_norms: bool = False,
    slides: Slides | None = None,
    selecting: SelectConfig = SELECT,
) -> tuple[IPSModel, float]:
    """The model after the steps of `changes`, without dropout, and the last loss."""
    model = _model()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d) and fixed_norms:
            _fix(module)
    settings = TrainConfig.model_validate({**_STEP, **changes})
    steps = train_steps(
        model, _optimizer(model), slides or _slides(), settings, selecting, seed=3, start_epoch=0, ranks=Ranks()
    )
    return model, list(steps)[-1].loss


def _same(one: IPSModel, other: IPSModel) -> None:
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": 1},
        {"micro_batch": 4},
        {"bounded": True, "norm": "frozen", "grad_chunk": 5},
        {"bounded": True, "norm": "frozen", "grad_chunk": 2, "micro_batch": 3},
    ],
)
def test_less_memory_and_the_same_gradient(changes: dict[str, object]) -> None:
    plain, loss = _stepped({}, fixed_norms=True)
    model, other = _stepped(changes, fixed_norms=True)
    assert other == pytest.approx(loss, rel=1e-5)
    _same(model, plain)


def test_group_norms_of_one_chunk_are_those_of_the_batch() -> None:
    plain, loss = _stepped({})
    model, other = _stepped({"bounded": True, "norm": "group", "grad_chunk": 1000})
    assert other == pytest.approx(loss, rel=1e-5)
    _same(model, plain)
    for name, value in plain.encoder.named_buffers():
        torch.testing.assert_close(model.encoder.get_buffer(name), value)


def test_a_frozen_encoder_stays_as_it_is_and_thaws_when_it_should() -> None:
    before = _model().encoder.state_dict()
    cases: list[tuple[dict[str, object], int, bool]] = [
        ({"freeze_encoder": True}, 2, False),
        ({"freeze_encoder_epochs": 1}, 2, True),
        ({"freeze_encoder_epochs": 2}, 3, True),
    ]
    for changes, epochs, thawed in cases:
        model, _ = _stepped({**changes, "epochs": epochs})
        after = model.encoder.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items()) != thawed
        assert after["norm.num_batches_tracked"] == int(thawed)
        assert not torch.equal(model.heads["spot"].weight, _model().heads["spot"].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"bounded": True, "norm": "frozen"}, {"freeze_encoder": True}])
def test_frozen_statistics_stay_on_three_ranks_to_the_last_bit(changes: dict[str, object]) -> None:
    """The mean of three equal numbers is not always that number: of random ones one in six moves."""
    model = _model()
    norm = model.encoder.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean = torch.full_like(norm.weight, 1 / 0.7)
    before = norm.running_mean.clone()
    assert not torch.equal((before + before + before) / 3, before)

    def three_alike(tensor: Tensor) -> None:
        tensor.copy_(tensor + tensor + tensor)

    alike = Ranks(0, 3, three_alike)
    settings = TrainConfig.model_validate({**_STEP, **changes})
    list(train_steps(model, _optimizer(model), _slides(), settings, SELECT, seed=3, start_epoch=0, ranks=alike))
    assert torch.equal(norm.running_mean, before)


def test_the_encoder_has_its_own_rate() -> None:
    moved = []
    for scale in (1.0, 0.01):
        model = _model()
        before = model.encoder.get_parameter("conv.weight").detach().clone()
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.0, {"encoder.": scale}), lr=1.0)
        settings = TrainConfig.model_validate(_STEP)
        list(train_steps(model, optimizer, _slides(), settings, SELECT, seed=3, start_epoch=0, ranks=Ranks()))
        moved.append(float((model.encoder.get_parameter("conv.weight").detach() - before).abs().max()))
    assert moved[1] == pytest.approx(0.01 * moved[0], rel=1e-2)


def test_balanced_sampling_shows_each_class_as_often() -> None:
    bags, targets = _bags(12)
    targets = [{"spot": float(index >= 9)} for index in range(12)]
    opened: list[int] = []

    def bag(index: int, epoch: int) -> Bag:
        opened.append(index)
        return bags[index]

    slides = Slides([len(b) for b in bags], targets, {"spot": "binary"}, bag)
    settings = TrainConfig(epochs=3, batch_size=4, warmup_epochs=0, sampling="balanced")
    model = _model()
    steps = train_steps(model, _optimizer(model), slides, settings, SELECT, seed=3, start_epoch=0, ranks=Ranks())
    next(steps)
    opened.clear()  # of the try
    list(steps)
    assert sum(index >= 9 for index in opened) in range(14, 19)  # 18 of 36, less what the first step took


@pytest.mark.parametrize("mode", ["random", "every"])
def test_baselines_train_without_scores(mode: Literal["random", "every"]) -> None:
    model, loss = _stepped({}, selecting=SelectConfig(mode=mode, memory=3, chunk=7))
    assert math.isfinite(loss)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_heads_may_take_in_turn_what_is_learned_from() -> None:
    slides, model = _slides(), _model()
    first, mean = (
        {index: select(model, [slides.bag(index, 0)], 3, 7, rank=rank).index[0] for index in range(11)}
        for rank in ("heads", "mean")
    )
    selecting, settings = SELECT.model_copy(update={"rank": "heads"}), TrainConfig.model_validate(_STEP)
    (done,) = train_steps(model, _optimizer(model), slides, settings, selecting, seed=3, start_epoch=0, ranks=Ranks())
    assert {index: rows.tolist() for index, rows in done.chosen.items()} == {i: r.tolist() for i, r in first.items()}
    assert any(set(first[index].tolist()) != set(mean[index].tolist()) for index in range(11))


def test_the_largest_slides_are_tried_first_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    bags, targets = _bags(5)
    order: list[int] = []

    def bag(index: int, epoch: int) -> Bag:
        order.append(index)
        return bags[index]

    slides = Slides([len(b) for b in bags], targets, {"spot": "binary"}, bag)
    model, _ = _stepped({"batch_size": 2}, slides=slides)
    assert order[:2] == [4, 3]
    assert len(order) == 2 + 5
    monkeypatch.setattr(_Turn, "try_largest", lambda *_: None)
    untried, _ = _stepped({"batch_size": 2}, slides=slides)
    for name, value in untried.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_with_context_the_step_that_is_tried_holds_that_of_every_slide(monkeypatch: pytest.MonkeyPatch) -> None:
    """J x D x D_v numbers a slide, or what does not fit would end after step one."""
    held: list[int | None] = []
    forward = Aggregator.forward

    def watched(self: Aggregator, x: Tensor, mask: Tensor, rest: Context | None = None) -> Tensor:
        held.append(None if rest is None else len(rest.log_mass))
        return forward(self, x, mask, rest)

    monkeypatch.setattr(Aggregator, "forward", watched)
    for context, count in (("none", None), ("all", 3)):
        held.clear()
        selecting = SelectConfig.model_validate({"memory": 3, "chunk": 7, "context": context})
        _stepped({"batch_size": 3}, slides=_slides(), selecting=selecting)
        assert held[0] == count  # the tried one; those after it are of 3 and 2 slides
        assert count is None or set(held) == {3, 2}


def test_as_many_slides_are_tried_as_a_rank_ever_gets() -> None:
    """Beside one of 90 patches the other rank gets all three small ones of a step of four."""
    bags: list[Bag] = [TensorBag(torch.zeros(90 if n == 2 else 5, 3, 5, 7, dtype=torch.uint8)) for n in range(8)]
    opened: list[int] = []
    tried: list[int] = []

    def bag(index: int, _epoch: int) -> Bag:
        opened.append(index)
        return bags[index]

    def announce(_order: Sequence[int]) -> None:
        tried.extend(opened)

    targets = [{"spot": float(n % 2)} for n in range(8)]
    slides = Slides([len(b) for b in bags], targets, {"spot": "binary"}, bag, announce=announce)
    for settings, hand in (({}, [2, 0, 1]), ({"micro_batch": 2}, [2, 0])):
        opened.clear()
        tried.clear()
        model = _model()
        train = TrainConfig.model_validate({**_STEP, "batch_size": 4, **settings})
        ranks = Ranks(1, 2, lambda _tensor: None)
        next(train_steps(model, _optimizer(model), slides, train, SELECT, seed=0, start_epoch=0, ranks=ranks))
        assert tried == hand


class _Greedy(nn.Module):
    """An encoder that asks for a petabyte in one of the passes."""

    def __init__(self, *, with_gradient: bool) -> None:
        super().__init__()
        self.inner, self.with_gradient = TinyEncoder(), with_gradient

    def forward(self, x: Tensor) -> Tensor:
        learns = next(self.inner.parameters()).requires_grad
        if (torch.is_grad_enabled() and learns) == self.with_gradient:
            torch.empty(2**50, dtype=torch.uint8)
        out: Tensor = self.inner(x)
        return out


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize(
    ("with_gradient", "advice"),
    [(False, "train.score_batch .*, model.select.chunk=7"), (True, "model.select.memory=3 or train.batch_size=4")],
)
def test_running_out_of_memory_comes_before_step_one(with_gradient: bool, advice: str, frozen: int) -> None:  # noqa: FBT001
    """Also where the encoder learns later only."""
    model = _model()
    model.encoder = _Greedy(with_gradient=with_gradient)
    settings = TrainConfig(epochs=4, batch_size=4, warmup_epochs=0, freeze_encoder_epochs=frozen)
    steps = train_steps(model, _optimizer(model), _slides(), settings, SELECT, seed=0, start_epoch=0, ranks=Ranks())
    with pytest.raises(StageError, match=f"out of memory .*lower {advice}"):
        next(steps)


def test_patches_are_scored_as_many_at_a_time_as_asked_for() -> None:
    seen: set[int] = set()
    for score_batch in (None, 8):
        model = _model()
        model.encoder.register_forward_pre_hook(lambda module, inputs: seen.add(len(inputs[0])))
        settings = TrainConfig(epochs=1, batch_size=1, warmup_epochs=0, score_batch=score_batch)
        next(train_steps(model, _optimizer(model), _slides(), settings, SELECT, seed=0, start_epoch=0, ranks=Ranks()))
        assert seen - {SELECT.memory} == {score_batch or 32}
        seen.clear()


def test_a_gradient_that_is_not_finite_leaves_the_weights() -> None:
    model = _model()
    before = copy.deepcopy(model.state_dict())
    model.get_parameter("heads.0:spot:binary.weight").register_hook(lambda gradient: gradient / 0)  # type: ignore[no-untyped-call]
    slides = Slides(
        _slides().sizes, _slides().targets, {"spot": "binary"}, _slides().bag, names=[f"s-{i}" for i in range(11)]
    )
    settings = TrainConfig(epochs=1, batch_size=2, warmup_epochs=0)
    steps = train_steps(model, _optimizer(model), slides, settings, SELECT, seed=0, start_epoch=0, ranks=Ranks())
    with pytest.raises(StageError, match=r"the gradient's norm became (inf|nan) at step 1 .*slides s-\d+"):
        next(steps)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_pixels_that_are_not_finite_are_named_before_step_one() -> None:
    bags: list[Bag] = [TensorBag(torch.full((4, 3, 5, 7), math.nan))]
    slides = Slides([4], [{"spot": 1.0}], {"spot": "binary"}, partial(_open, bags), names=["case-7"])
    model = _model()
    steps = train_steps(model, _optimizer(model), slides, TrainConfig(), SELECT, seed=0, start_epoch=0, ranks=Ranks())
    with pytest.raises(StageError, match=r"NaN or infinity, when the largest slides \(case-7\) were tried"):
        next(steps)


def test_with_context_the_loss_is_that_of_all_patches_whatever_the_memory() -> None:
    """Of the same weights, under frozen statistics."""
    frozen = {"bounded": True, "norm": "frozen", "grad_chunk": 4}
    every, wanted = _stepped(frozen, selecting=SelectConfig(mode="every", chunk=7))
    for memory in (1, 3, 50):
        model, loss = _stepped(frozen, selecting=SelectConfig(memory=memory, chunk=7, context="all"))
        assert loss == pytest.approx(wanted, rel=1e-5)
        for (name, p), (_, q) in zip(
            model.aggregator.named_parameters(), every.aggregator.named_parameters(), strict=True
        ):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
    _same(model, every)  # of the encoder too, where all are winners
    assert _stepped(frozen)[1] != pytest.approx(wanted, rel=1e-3)


def test_with_context_patches_may_be_drawn_by_their_attention_anew_each_epoch() -> None:
    """Else the best are taken. (The optimiser is of another model: this one does not learn.)"""
    taken = []
    for context, learn_from in (("none", "best"), ("all", "best"), ("all", "drawn")):
        selecting = SelectConfig.model_validate({"memory": 3, "chunk": 7, "context": context, "learn_from": learn_from})
        settings = TrainConfig.model_validate({**_STEP, "epochs": 3})
        steps = train_steps(
            _still(), _optimizer(_still()), _slides(), settings, selecting, seed=3, start_epoch=0, ranks=Ranks()
        )
        chosen = [{n: rows.tolist() for n, rows in step.chosen.items()} for step in steps]
        assert all(len(set(rows)) == len(rows) for epoch in chosen for rows in epoch.values())
        assert (chosen[0] == chosen[1] == chosen[2]) == (learn_from == "best")
        taken.append(chosen)
    assert taken[0] == taken[1] != taken[2]


def _still() -> IPSModel:
    """A model whose norms stay as they are."""
    model = _model()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            _fix(module)
    return model


def test_exploring_with_context_scores_what_it_does_not_select() -> None:
    bags, targets = _bags(11)
    chunks: list[int] = []

    class Counted(TensorBag):
        def chunks(self, size: int) -> Iterator[Chunk]:
            for chunk in super().chunks(size):
                chunks.append(len(chunk.index))
                yield chunk

    counted = [Counted(bag.patches) for bag in bags if isinstance(bag, TensorBag)]
    orders: list[list[int]] = []
    slides = Slides(
        [len(bag) for bag in bags], targets, {"spot": "binary"}, partial(_open, counted),
        announce=lambda order: orders.append(list(order)),
    )  # fmt: skip
    changes: dict[str, object] = {"epochs": 2, "explore_epochs": 1}
    for context, scored in (("none", 1), ("all", 2)):
        chunks.clear()
        orders.clear()
        selecting = SelectConfig.model_validate({"memory": 3, "chunk": 7, "context": context})
        _stepped(changes, slides=slides, selecting=selecting)
        assert [bool(order) for order in orders] == [context == "all", True]
        tried = max(slides.sizes)  # the largest slide, before step one
        assert sum(chunks) == scored * sum(slides.sizes) + tried
