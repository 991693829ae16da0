from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan import epoch_plan, plan_digest, steps_per_epoch

SIZES = st.lists(st.integers(1, 100_000), min_size=1, max_size=60)


@given(sizes=SIZES, batch=st.integers(1, 17), world=st.integers(1, 5), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_each_slide_once_and_equal_steps(sizes: list[int], batch: int, world: int, seed: int, epoch: int) -> None:
    plan = epoch_plan(sizes, batch_size=batch, world_size=world, seed=seed, epoch=epoch)
    taken = [index for step in plan for hand in step for index in hand]
    assert sorted(taken) == list(range(len(sizes)))
    assert len(plan) == steps_per_epoch(len(sizes), batch)
    assert all(len(step) == world for step in plan)
    counts = [sum(map(len, step)) for step in plan]
    assert max(counts) <= batch
    assert max(counts) - min(counts) <= 1


@given(sizes=SIZES, batch=st.integers(1, 17), seed=st.integers(0, 9))
def test_a_step_holds_the_same_slides_on_any_number_of_ranks(sizes: list[int], batch: int, seed: int) -> None:
    one, three = (epoch_plan(sizes, batch_size=batch, world_size=w, seed=seed, epoch=2) for w in (1, 3))
    together = [sorted(i for hand in step for i in hand) for step in three]
    assert [sorted(step[0]) for step in one] == together


def test_epochs_and_seeds_shuffle_differently() -> None:
    plans = {
        epoch_plan(range(1, 41), batch_size=8, world_size=1, seed=seed, epoch=epoch)
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(plans) == 9


def test_ranks_are_balanced_by_patches_not_by_slides() -> None:
    (step,) = epoch_plan([1000, 10, 10, 10, 500, 490], batch_size=6, world_size=2, seed=0, epoch=0)
    loads = [sum([1000, 10, 10, 10, 500, 490][i] for i in hand) for hand in step]
    assert max(loads) == 1010


def test_digest_knows_slides_sizes_and_recipe() -> None:
    digests = {
        plan_digest(["a", "b"], [1, 2], "r"),
        plan_digest(["b", "a"], [1, 2], "r"),
        plan_digest(["a", "b"], [2, 1], "r"),
        plan_digest(["a", "b"], [1, 2], "s"),
    }
    assert len(digests) == 4
