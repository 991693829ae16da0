"""The loop over two gloo processes against the loop in one, without Ray."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from ips.bag import Bag, Selection, TensorBag
from ips.learning.schedule import parameter_groups
from ips.network.aggregator import Aggregator
from ips.network.heads import linear_head
from ips.network.model import IPSModel
from pipeline.config.model import SelectConfig, TrainConfig
from pipeline.training import loop
from pipeline.training.hands import Pick, Slides, select_hand
from pipeline.training.loop import train_steps
from pipeline.training.plan import Step, epoch_plan
from pipeline.training.ranks import Ranks, joined_ranks
from tests.gloo import one_of_two
from tests.pipeline.training import test_loop
from tests.pipeline.training.test_loop import TinyEncoder, _open

LENGTHS = (5, 90, 8, 11, 40, 7, 14, 6, 17, 9, 12)
SELECT = SelectConfig(memory=3, chunk=7)
CONTEXT = SelectConfig(memory=3, chunk=7, context="all", learn_from="drawn")
HEADS = SelectConfig(memory=3, chunk=7, rank="heads")
# Frozen statistics and no dropout: what a rank computes of a slide then does not depend on the others in its hand.
SETTINGS = TrainConfig(epochs=7, batch_size=4, lr=1e-2, warmup_epochs=1, bounded=True, norm="frozen", grad_chunk=4)


def _model() -> IPSModel:
    torch.manual_seed(0)
    aggregator = Aggregator(8, tasks=1, heads=2, key_dim=4, value_dim=4, hidden_dim=16, dropout=0.0)
    head = {"spot": linear_head("binary", 8, 2)}
    return IPSModel(TinyEncoder(), aggregator, head, None, (0.5,) * 3, (0.25,) * 3).double()


def _slides() -> Slides:
    generator = torch.Generator().manual_seed(7)
    bags = [TensorBag(torch.randint(0, 255, (n, 3, 5, 7), dtype=torch.uint8, generator=generator)) for n in LENGTHS]
    targets = [{"spot": float(n % 2)} for n in LENGTHS]
    return Slides(LENGTHS, targets, {"spot": "binary"}, partial(_open, bags))


Chosen = dict[tuple[int, int], list[int]]
"""(number of the hand, slide) -> rows selected."""


def _train(
    ranks: Ranks, state: Mapping[str, Any] | None, start: int, stop: int, selecting: SelectConfig = SELECT
) -> tuple[dict[str, Any], Chosen]:
    """Train from one epoch to another; the state after it, and what was selected."""
    model = _model()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1.0)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would go on in the given tensors
    chosen: Chosen = {}
    losses = []
    step = 3 * start

    def recorded(hand: Sequence[int], bags: Sequence[Bag], known: Mapping[int, Selection], pick: Pick) -> Selection:
        found = select_hand(hand, bags, known, pick)
        for index, rows in zip(hand, found.index.tolist(), strict=True):
            chosen[step, index] = rows
        return found

    with mock.patch.object(loop, "select_hand", recorded):
        for done in train_steps(
            model, optimizer, _slides(), SETTINGS, selecting, seed=3, start_epoch=start, ranks=ranks
        ):
            step = done.step
            losses.append(done.loss)
            if done.last_of_epoch and done.epoch + 1 == stop:
                break
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}, chosen


def _steps(state: Mapping[str, Any] | None, start: int, stop: int | None = None) -> dict[str, Any]:
    """One rank's state after step `stop`, or the last one, with dropout, batch statistics and random exploration."""
    model = test_loop._model()
    optimizer = test_loop._optimizer(model)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    settings = TrainConfig(epochs=4, batch_size=4, lr=1e-2, warmup_epochs=1, explore_epochs=1)
    slides, ranks, (epoch, step) = test_loop._slides(), joined_ranks(), divmod(start, 3)
    for done in train_steps(
        model, optimizer, slides, settings, SELECT, seed=3, start_epoch=epoch, start_step=step, ranks=ranks
    ):
        if done.step == stop:
            break
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def _resumed() -> tuple[dict[str, Any], dict[str, Any]]:
    """The end of a run, and of one that stopped within an epoch and went on from the state that checkpoints have."""
    whole, box = _steps(None, 0), [_steps(None, 0, 4)]
    torch.randn(5)  # a new process has other random numbers
    dist.broadcast_object_list(box, 0)
    return whole, _steps(box[0], 4)


def _worker(rank: int, folder: str) -> None:
    with one_of_two(rank, folder):
        half, chosen = _train(joined_ranks(), None, 0, 4)
        state, more = _train(joined_ranks(), half, 4, 7)
        torch.save((half, state, chosen | more), f"{folder}/{rank}.pt")
        torch.save(_resumed(), f"{folder}/resumed-{rank}.pt")
        torch.save(_train(joined_ranks(), None, 0, 3, CONTEXT), f"{folder}/context-{rank}.pt")
        torch.save(_train(joined_ranks(), None, 0, 3, HEADS), f"{folder}/heads-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("two")
    spawn(_worker, args=(str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> Callable[[int], tuple[dict[str, Any], dict[str, Any], Chosen]]:
    """rank -> state after four epochs, after seven, and what it selected."""
    return lambda rank: torch.load(folder / f"{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def one() -> tuple[dict[str, Any], Chosen]:
    return _train(Ranks(), None, 0, 7)


def _plan() -> list[Step]:
    plan = partial(epoch_plan, LENGTHS, batch_size=4, world_size=2, seed=3, shard_above="auto")
    return [step for epoch in range(7) for step in plan(epoch=epoch)]


def _assert_alike(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_two_processes_train_as_one_does(
    two: Callable[[int], tuple[dict[str, Any], dict[str, Any], Chosen]], one: tuple[dict[str, Any], Chosen]
) -> None:
    """After 21 steps: the same weights but for rounding, from the same selections."""
    plan = _plan()
    assert any(step.shared for step in plan)
    assert any(set(step.slides) - set(step.shared) for step in plan)
    assert {len(hand) for step in plan for hand in step.hands} > {1, 2}
    alone, selected = one
    together: Chosen = {}
    for rank in range(2):
        _, state, chosen = two(rank)
        _assert_alike(state["model"], alone["model"])
        assert alone["losses"][-9:] == pytest.approx(state["losses"], rel=1e-9)
        together |= chosen
    assert len(selected) == 7 * len(LENGTHS)
    assert together == selected
    first, second = (two(rank)[1]["model"] for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    untrained = _model().state_dict()
    assert (first["encoder.conv.weight"] - untrained["encoder.conv.weight"]).abs().max() > 1e-2


@pytest.mark.slow
def test_two_ranks_that_stopped_within_an_epoch_go_on_as_if_they_had_not(folder: Path) -> None:
    """Bit for bit."""
    for rank in range(2):
        whole, resumed = torch.load(folder / f"resumed-{rank}.pt", weights_only=True)
        assert all(torch.equal(resumed["model"][name], value) for name, value in whole["model"].items())
        moments = [state["optimizer"]["state"] for state in (whole, resumed)]
        for index, moment in moments[0].items():
            assert all(torch.equal(moments[1][index][name], value) for name, value in moment.items())


@pytest.mark.slow
def test_a_run_goes_on_at_another_world_size(
    two: Callable[[int], tuple[dict[str, Any], dict[str, Any], Chosen]], one: tuple[dict[str, Any], Chosen]
) -> None:
    """Four epochs on two ranks, three on one: every slide once an epoch, and the weights of a run on one."""
    half, _, before = two(0)
    state, after = _train(Ranks(), half, 4, 7)
    assert sorted(index for _, index in after) == sorted(list(range(len(LENGTHS))) * 3)
    assert (before | two(1)[2] | after) == one[1]
    _assert_alike(state["model"], one[0]["model"])


def _assert_both_did(folder: Path, name: str, alone: Mapping[str, Any], selected: Chosen) -> None:
    """Two processes have the weights of one, and took together what it took."""
    together: Chosen = {}
    for rank in range(2):
        state, chosen = torch.load(folder / f"{name}-{rank}.pt", weights_only=True)
        _assert_alike(state["model"], alone["model"])
        together |= chosen
    assert together == selected


@pytest.mark.slow
def test_two_processes_with_context_train_as_one_does(folder: Path, one: tuple[dict[str, Any], Chosen]) -> None:
    """Shared slides' sums come from both; the weights are those of one process, and not those without context."""
    alone, selected = _train(Ranks(), None, 0, 3, CONTEXT)
    _assert_both_did(folder, "context", alone, selected)
    assert (
        alone["model"]["aggregator.attention.queries"] - _model().state_dict()["aggregator.attention.queries"]
    ).any()
    assert alone["losses"][0] != pytest.approx(one[0]["losses"][0], rel=1e-6)


@pytest.mark.slow
def test_two_processes_whose_heads_take_in_turn_train_as_one_does(
    folder: Path, one: tuple[dict[str, Any], Chosen]
) -> None:
    alone, selected = _train(Ranks(), None, 0, 3, HEADS)
    _assert_both_did(folder, "heads", alone, selected)
    assert any(set(rows) != set(one[1][where]) for where, rows in selected.items())
