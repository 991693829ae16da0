from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from ips.bag import Chunk, Selection, TensorBag
from ips.network.model import IPSModel
from ips.selection.select import select
from pipeline.config.model import SelectConfig, TrainConfig
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.model.checkpoint import Progress, load_checkpoint, save_checkpoint, take_snapshot, write_snapshot
from pipeline.training import loop
from pipeline.training.hands import Slides
from pipeline.training.loop import StepDone, train_steps
from pipeline.training.plan import Step
from pipeline.training.ranks import Ranks, joined_ranks
from pipeline.training.winners import Turns, Winners
from tests.gloo import one_of_two
from tests.pipeline.training import test_loop
from tests.pipeline.training.test_loop import SELECT, _bags, _open, _optimizer
from tests.pipeline.training.test_two_ranks import LENGTHS
from tests.pipeline.training.test_two_ranks import SETTINGS as FROZEN
from tests.pipeline.training.test_two_ranks import _model as _exact_model
from tests.pipeline.training.test_two_ranks import _slides as _uneven_slides

CPU = torch.device("cpu")
CONFIG = Config.model_validate({"name": "x", "cohort": {"uri": "c"}, "tasks": [{"name": "spot", "column": "label"}]})
SETTINGS = TrainConfig(epochs=6, batch_size=4, lr=1e-2, warmup_epochs=1, explore_epochs=1, reselect_every=3)


def _scores(visit: int, first: int, every: int) -> bool:
    """The twin: whether the `visit`-th visit of a slide, from 0, scores it."""
    return visit == 0 or (visit > first and (visit - first - 1) % every == 0)


@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=25), st.integers(2, 9),
    st.lists(st.sets(st.integers(0, 24), max_size=6), max_size=40), st.integers(0, 39),
)  # fmt: skip
def test_each_visit_scores_or_not_as_its_number_says(
    sizes: list[int], every: int, steps: list[set[int]], stop: int
) -> None:
    turns = Turns.of(sizes, every)
    visits = [0] * len(sizes)
    for number, step in enumerate(steps):
        if number == stop:  # looked ahead, and gone on from what a checkpoint has
            ahead = turns.copy()
            ahead.visit(range(len(sizes)))
            turns = replace(Turns.of(sizes, every), left=list(turns.left))
        slides = [slide for slide in step if slide < len(sizes)]
        wanted = {slide for slide in slides if not _scores(visits[slide], turns.first[slide], every)}
        assert turns.visit(slides) == wanted
        for slide in slides:
            visits[slide] += 1


@given(st.lists(st.integers(50, 100), min_size=40, max_size=60), st.integers(2, 8))
def test_after_the_first_epoch_all_score_alike(sizes: list[int], every: int) -> None:
    turns = Turns.of(sizes, every)
    everyone = range(len(sizes))
    scored = [set(everyone) - turns.visit(everyone) for _ in range(3 * every)]
    assert scored[0] == set(everyone)
    for start in range(1, 2 * every):
        assert sorted(slide for epoch in scored[start : start + every] for slide in epoch) == list(everyone)
    costs = [sum(sizes[slide] for slide in epoch) for epoch in scored[1:]]
    assert max(costs) - min(costs) <= 100  # a slide, at most


class Counted(TensorBag):
    """Counts the rows that are read; equals no other bag."""

    def __init__(self, patches: Tensor, read: list[int]) -> None:
        super().__init__(patches)
        self.read = read

    def chunks(self, size: int) -> Iterator[Chunk]:
        for chunk in super().chunks(size):
            self.read[0] += len(chunk.index)
            yield chunk

    def take(self, rows: Tensor) -> Chunk:
        self.read[1] += len(rows)
        return super().take(rows)


def _counted() -> tuple[Slides, list[int]]:
    """Slides, and rows of them that were read to score and to train."""
    bags, targets = _bags(11)
    read = [0, 0]
    counted = [Counted(bag.patches, read) for bag in bags if isinstance(bag, TensorBag)]
    return Slides([len(b) for b in bags], targets, {"spot": "binary"}, partial(_open, counted)), read


def _steps(
    model: IPSModel, slides: Slides, settings: TrainConfig, winners: Winners | None, optimizer: Any = None, **at: int
) -> Iterator[StepDone]:
    place = {"start_epoch": 0, **at}
    return train_steps(
        model, optimizer or _optimizer(model), slides, settings, SELECT, seed=3, ranks=Ranks(), winners=winners, **place
    )


def _twin(settings: TrainConfig) -> dict[str, Tensor]:
    """A training that scores every visit; the selection of some is exchanged for a remembered one."""
    slides, _ = _counted()
    bags = [slides.bag(index, 0) for index in range(11)]
    first = Turns.of(slides.sizes, settings.reselect_every).first
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    visits = [0] * 11

    def scores(slide: int) -> bool:
        return _scores(visits[slide], first[slide], settings.reselect_every)

    def remembered(net: IPSModel, given: Sequence[Any], *args: Any, **kwargs: Any) -> Selection:
        found = select(net, given, *args, **kwargs)
        if given[0] in bags:  # not watched: the largest slide is tried
            return found
        index, mask = found.index.clone(), found.mask.clone()
        for n, bag in enumerate(given):
            slide = bags.index(bag._bag)
            if scores(slide):
                kept[slide] = (found.index[n], found.mask[n])
            index[n], mask[n] = kept[slide]
            visits[slide] += 1
        return replace(found, index=index, mask=mask)

    def dealt(step: Sequence[int], *_: object) -> Step:
        """Those with most to read first; each slide comes once an epoch, before which its steps are dealt."""
        costs = [size if scores(slide) else min(3, size) for slide, size in enumerate(slides.sizes)]
        return Step((tuple(sorted(step, key=lambda slide: (-costs[slide], slide))),))

    model = test_loop._model()
    with mock.patch.multiple(loop, select=remembered, dealt=dealt):
        list(_steps(model, slides, settings, None))
    return model.state_dict()


def test_it_trains_as_one_that_scores_every_visit_and_forgets_what_it_found() -> None:
    """Bit for bit; and what is read is M where winners serve."""
    slides, read = _counted()
    model = test_loop._model()
    winners = Winners(slides.sizes, 3, 3)
    steps: list[StepDone] = []
    scored: list[int] = []
    for step in _steps(model, slides, SETTINGS, winners):
        scored.append(read[0])
        steps.append(step)
    twin = _twin(SETTINGS)
    assert all(torch.equal(value, twin[name]) for name, value in model.state_dict().items())
    whole, first = sum(slides.sizes), winners.turns.first
    per_epoch = [sum(step.read for step in steps if step.epoch == epoch) for epoch in range(6)]
    assert per_epoch[1] == whole  # of the first epoch after the exploration
    assert sum(per_epoch[2:5]) == whole + 2 * 3 * 11  # each slide once, its three winners twice
    wanted = [[size for size, turn in zip(slides.sizes, first, strict=True) if _scores(n, turn, 3)] for n in range(5)]
    ends = [scored[3 * epoch + 2] for epoch in range(6)]
    assert [after - before for before, after in pairwise(ends)] == [sum(sizes) for sizes in wanted]
    changed = [share for step in steps for share in step.changed]
    assert len(changed) == sum(map(len, wanted[1:]))
    assert all(0 <= share <= 1 for share in changed)
    assert any(changed)


@pytest.mark.parametrize("sampling", ["all", "balanced"])
@pytest.mark.parametrize("stop", [2, 5, 10])
def test_resumed_within_an_epoch_is_uninterrupted_bit_for_bit(stop: int, sampling: str, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"sampling": sampling})
    slides, _ = _counted()
    whole, last = test_loop._model(), Winners(slides.sizes, 3, 3)
    losses = [step.loss for step in _steps(whole, slides, settings, last)]
    first, winners = test_loop._model(), Winners(slides.sizes, 3, 3)
    optimizer = _optimizer(first)
    *_, done = islice(_steps(first, slides, settings, winners, optimizer), stop)
    progress = Progress(done.epoch, done.step, "plan", step_in_epoch=stop % 3)
    write_snapshot(tmp_path, take_snapshot(first, optimizer, CONFIG, progress, winners.state))
    torch.randn(5)
    second, read = test_loop._model(), Winners(slides.sizes, 3, 3)
    optimizer = _optimizer(second)
    load_checkpoint(tmp_path, second, optimizer, "plan", read.load)
    at = {"start_epoch": stop // 3, "start_step": stop % 3}
    assert [step.loss for step in _steps(second, slides, settings, read, optimizer, **at)] == losses[stop:]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in second.state_dict().items())
    assert all(torch.equal(value, last.state[name]) for name, value in read.state.items())


def test_a_checkpoint_without_winners_or_with_those_of_others_is_refused(tmp_path: Path) -> None:
    model = test_loop._model()
    save_checkpoint(tmp_path, model, _optimizer(model), CONFIG, Progress(1, 3, "plan"))
    winners = Winners([5, 7], 3, 2)
    with pytest.raises(StageError, match=r"state.pt: cannot .*\(it holds no winners, and train.reselect_every goes"):
        load_checkpoint(tmp_path, model, _optimizer(model), "plan", winners.load)
    with pytest.raises(ValueError, match=r"winners of shape \(3, 3\) for slides and M of \(2, 3\)"):
        winners.load(Winners([5, 7, 9], 3, 2).state)


def test_one_rank_speaks_for_a_slide_that_two_have() -> None:
    """Balanced sampling draws a slide twice, and a step may hold both."""
    winners = Winners([5, 7, 9], 2, 2)
    rows = {0: torch.tensor([3, 1]), 1: torch.tensor([6, -1]), 2: torch.tensor([8, 0])}
    step = Step(((1, 0), (2, 1)))
    total = sum((_part(winners, step, rows, rank) for rank in range(2)), torch.zeros(3, 2, dtype=torch.int64))
    assert torch.equal(total - 1, torch.stack(list(rows.values())))


def _part(winners: Winners, step: Step, rows: dict[int, Tensor], rank: int) -> Tensor:
    """What one of two ranks adds to the sum."""
    parts: list[Tensor] = []
    mine = {slide: rows[slide] for slide in step.hands[rank]}
    copy.deepcopy(winners).note(step, mine, Ranks(rank, 2, lambda part: parts.append(part.clone())), CPU)
    return parts[0]


UNEVEN = FROZEN.model_copy(update={"reselect_every": 3})


def _ended(ranks: Ranks, selecting: SelectConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    model = _exact_model()
    winners = Winners(LENGTHS, 3, 3)
    optimizer = _optimizer(model)
    steps = train_steps(
        model, optimizer, _uneven_slides(), UNEVEN, selecting, seed=3, start_epoch=0, ranks=ranks, winners=winners
    )
    changed = [share for step in steps for share in step.changed]
    return model.state_dict(), winners.state, changed


def _worker(rank: int, folder: str) -> None:
    with one_of_two(rank, folder):
        torch.save(_ended(joined_ranks(), SELECT), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_serve_the_winners_of_one(tmp_path: Path) -> None:
    """One of the slides is shared where it is scored; exploration differs by rank, so all score from the start."""
    spawn(_worker, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    weights, winners, changed = _ended(Ranks(), SELECT)
    for rank in range(2):
        state, rows, found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in weights.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12)
        assert all(torch.equal(rows[name], value) for name, value in winners.items())
        assert found == changed
    assert any(changed)


def test_a_streamed_order_has_the_slides_that_are_scored() -> None:
    """`announce` is told what the rank will score: nothing that is served."""
    orders: list[list[int]] = []
    slides, _ = _counted()
    told = replace(slides, announce=lambda order: orders.append(list(order)))
    list(_steps(test_loop._model(), told, SETTINGS, Winners(slides.sizes, 3, 3)))
    assert [len(order) for order in orders[:2]] == [0, 11]
    assert sorted(slide for order in orders[2:5] for slide in order) == list(range(11))
