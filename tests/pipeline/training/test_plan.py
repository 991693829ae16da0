from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.plan import (
    MAX_WAIT,
    ShardAbove,
    Step,
    balanced_slides,
    deal,
    dealt,
    epoch_plan,
    longest_hand,
    plan_digest,
    steps_per_epoch,
)

SIZES = st.lists(st.integers(1, 100_000), min_size=1, max_size=60)


@given(
    sizes=SIZES,
    batch=st.integers(1, 17),
    world=st.integers(1, 5),
    epoch=st.integers(0, 9),
    window=st.integers(1, 5),
    shard_above=st.sampled_from([None, "auto", 50_000]),
)
def test_each_slide_once_and_equal_steps(
    sizes: list[int], batch: int, world: int, epoch: int, window: int, shard_above: ShardAbove
) -> None:
    plan = epoch_plan(
        sizes, batch_size=batch, world_size=world, seed=3, epoch=epoch, window=window, shard_above=shard_above
    )
    taken = [index for step in plan for hand in step.hands for index in hand]
    assert sorted(taken) == list(range(len(sizes)))
    assert len(plan) == steps_per_epoch(len(sizes), batch)
    assert all(len(step.hands) == world for step in plan)
    assert all(set(step.shared) <= set(step.slides) for step in plan)
    counts = [len(step.slides) for step in plan]
    assert max(counts) <= batch
    assert max(counts) - min(counts) <= 1


@given(sizes=SIZES, batch=st.integers(1, 17), seed=st.integers(0, 9), window=st.integers(1, 5))
def test_a_step_holds_the_same_slides_on_any_number_of_ranks(
    sizes: list[int], batch: int, seed: int, window: int
) -> None:
    one, three = (
        epoch_plan(sizes, batch_size=batch, world_size=w, seed=seed, epoch=2, window=window, shard_above="auto")
        for w in (1, 3)
    )
    assert [sorted(step.slides) for step in one] == [sorted(step.slides) for step in three]
    assert not any(step.shared for step in one)


@given(sizes=SIZES, batch=st.integers(1, 17), world=st.integers(2, 5))
def test_shared_slides_are_the_largest_and_as_few_as_keep_waiting_short(
    sizes: list[int], batch: int, world: int
) -> None:
    for step in epoch_plan(sizes, batch_size=batch, world_size=world, seed=0, epoch=0, shard_above="auto"):
        work = sum(sizes[index] for index in step.slides)
        assert 1 - work / world / step.cost(sizes) <= MAX_WAIT + 1e-9
        ranked = sorted(step.slides, key=lambda index: (-sizes[index], index))
        assert list(step.shared) == ranked[: len(step.shared)]
    big = epoch_plan(sizes, batch_size=batch, world_size=world, seed=0, epoch=0, shard_above=70_000)
    assert {i for step in big for i in step.shared} == {i for i, size in enumerate(sizes) if size > 70_000}


def _loguniform(rng: random.Random) -> int:
    return round(100 * math.exp(rng.random() * math.log(100)))


def _two_kinds(rng: random.Random) -> int:
    return 10_000 if rng.random() < 0.1 else 100


# Nine small slides to one a hundred times their size: without sharing, no order keeps ranks from waiting for that one.
@pytest.mark.parametrize("size", [_loguniform, _two_kinds])
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize(("per_rank", "window"), [(4, 1), (8, 1), (1, 8), (2, 8), (2, 16)])
def test_ranks_wait_little_at_hundredfold_differences(
    size: Callable[[random.Random], int], world: int, per_rank: int, window: int
) -> None:
    rng = random.Random(5)
    sizes = [size(rng) for _ in range(480)]
    plan = partial(epoch_plan, sizes, batch_size=world * per_rank, world_size=world, seed=1, epoch=1, window=window)
    assert _waiting(plan(shard_above="auto"), sizes) < 0.1
    if size is _loguniform and per_rank > 1:
        assert _waiting(plan(shard_above=None), sizes) < 0.1


def test_without_windows_and_sharing_ranks_wait() -> None:
    """What the measures are for; the simulation sees it."""
    rng = random.Random(5)
    sizes = [_loguniform(rng) for _ in range(480)]
    assert _waiting(epoch_plan(sizes, batch_size=8, world_size=8, seed=1, epoch=1), sizes) > 0.5


def _waiting(plan: Sequence[Step], sizes: Sequence[int]) -> float:
    """Share of the ranks' time in which they wait for the slowest one of a step."""
    return 1 - sum(sizes) / sum(len(step.hands) * step.cost(sizes) for step in plan)


def test_a_window_brings_slides_alike_together_in_random_order() -> None:
    sizes = list(range(1000, 1040))
    plan = epoch_plan(sizes, batch_size=4, world_size=2, seed=0, epoch=0, window=5)
    plain = epoch_plan(sizes, batch_size=4, world_size=2, seed=0, epoch=0)
    for first in (0, 5):
        window, shuffled = plan[first : first + 5], plain[first : first + 5]
        assert sorted(i for step in window for i in step.slides) == sorted(i for step in shuffled for i in step.slides)
        ranges = sorted((min(step.slides), max(step.slides)) for step in window)
        assert all(a[1] < b[0] for a, b in pairwise(ranges))
    assert [min(step.slides) for step in plan[:5]] != sorted(min(step.slides) for step in plan[:5])


def test_a_step_over_drawn_slides() -> None:
    assert Step(((0, 2), (1,)), (2,)).of([7, 7, 9]) == Step(((7, 9), (7,)), (9,))


def test_epochs_and_seeds_shuffle_differently() -> None:
    plans = {
        epoch_plan(range(1, 41), batch_size=8, world_size=1, seed=seed, epoch=epoch)
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(plans) == 9


def test_ranks_are_balanced_by_patches_not_by_slides() -> None:
    (step,) = epoch_plan([1000, 10, 10, 10, 500, 490], batch_size=6, world_size=2, seed=0, epoch=0)
    loads = [sum([1000, 10, 10, 10, 500, 490][i] for i in hand) for hand in step.hands]
    assert max(loads) == 1010


def test_digest_knows_slides_sizes_and_recipe() -> None:
    digests = {
        plan_digest(["a", "b"], [1, 2], "r"),
        plan_digest(["b", "a"], [1, 2], "r"),
        plan_digest(["a", "b"], [2, 1], "r"),
        plan_digest(["a", "b"], [1, 2], "s"),
    }
    assert len(digests) == 4


@given(SIZES, st.integers(1, 5))
def test_what_is_dealt_goes_to_one_rank_each_evenly(sizes: list[int], world: int) -> None:
    hands = deal(sizes, world)
    assert len(hands) == world
    assert sorted(index for hand in hands for index in hand) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(sizes)


CLASSES = st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan]), min_size=1, max_size=40)


@given(CLASSES, st.integers(0, 3), st.integers(0, 9))
def test_classes_come_alike_and_their_slides_too(numbers: list[float], seed: int, epoch: int) -> None:
    drawn = balanced_slides(numbers, seed, epoch)
    assert len(drawn) == len(numbers)
    names = [str(number) for number in numbers]
    by_class = Counter(dict.fromkeys(names, 0))
    by_class.update(names[index] for index in drawn)
    assert max(by_class.values()) - min(by_class.values()) <= 1
    for name in set(names):
        times = Counter({index: 0 for index, other in enumerate(names) if other == name})
        times.update(index for index in drawn if names[index] == name)
        assert max(times.values()) - min(times.values()) <= 1
    assert drawn == balanced_slides(numbers, seed, epoch)


def test_frequent_classes_take_turns_until_all_had_theirs() -> None:
    numbers = [0.0] * 12 + [1.0] * 4
    epochs = [balanced_slides(numbers, 0, epoch) for epoch in range(3)]
    seen = Counter(index for drawn in epochs for index in drawn)
    assert {seen[index] for index in range(12)} == {2}
    assert {seen[index] for index in range(12, 16)} == {6}
    assert balanced_slides(numbers, 1, 0) != epochs[0]


def test_served_slides_are_not_shared_and_cost_what_is_read() -> None:
    """The largest is served: it would be shared, and now weighs as little as its winners."""
    sizes = [900, 40, 30, 20]
    assert dealt(range(4), sizes, 2, 100).shared == (0,)
    step = dealt(range(4), [8, 40, 30, 20], 2, 5).of([3, 1, 2, 0], frozenset({3}))
    assert step.hands == ((1, 3), (2, 0)) or step.served == {3}
    assert 3 not in step.shared
    assert set(step.shared) == {1, 2, 0}


def test_the_longest_hand_is_that_of_as_many_epochs_as_have_a_million_slides() -> None:
    plans = [[Step(((0,), (1, 2)))], [Step(((0, 1, 2), ()))], [Step(((0, 1, 2, 3), ()))]]
    assert longest_hand(plans, 3) == 4
    assert longest_hand(iter(plans), 500_000) == 3
    assert longest_hand(iter(plans), 3_000_000) == 3  # the first may be the rest of an epoch
