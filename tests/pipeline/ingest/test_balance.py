"""Portions of work: nothing left out or twice, and none much larger than the others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingest.balance import SLIDE_BYTES, TASK_BYTES, group_slides, share_count, shares
from pipeline.store.parts import part_patches

SIZES = st.lists(st.integers(0, 5 * 10**9), max_size=60)


@given(SIZES, st.floats(1, 500))
def test_every_slide_is_in_one_group_and_no_group_is_twice_the_portion(sizes: list[int], slots: float) -> None:
    groups = group_slides(sizes, slots)
    assert sorted(place for group in groups for place in group) == list(range(len(sizes)))
    portion = min(TASK_BYTES, sum(size + SLIDE_BYTES for size in sizes) / (4 * slots))
    costs = [sum(sizes[place] + SLIDE_BYTES for place in group) for group in groups]
    assert all(len(group) == 1 or cost < 2 * portion for group, cost in zip(groups, costs, strict=True))
    assert all(cost >= portion for cost in costs[:-1])


@given(SIZES, st.floats(1, 500))
def test_the_largest_slides_start_first(sizes: list[int], slots: float) -> None:
    order = [sizes[place] for group in group_slides(sizes, slots) for place in group]
    assert order == sorted(sizes, reverse=True)


def test_small_slides_share_tasks_and_large_ones_have_their_own() -> None:
    groups = group_slides([10**6] * 200 + [3 * 10**9, 10**9], slots=2)
    assert groups[:2] == [[200], [201]]
    assert 2 <= len(groups[2:]) <= 5


@given(st.integers(1, 3000), st.integers(8, 4096))
def test_shares_cover_the_parts_evenly(parts: int, patch_px: int) -> None:
    count = share_count(parts, patch_px)
    cut = shares(parts, count)
    assert [number for share in cut for number in share] == list(range(parts))
    assert max(map(len, cut)) - min(map(len, cut)) <= 1
    assert min(map(len, cut)) >= 1


def test_a_slide_of_250000_patches_is_cut_into_about_thirty_shares() -> None:
    parts = -(-250_000 // part_patches(256))
    assert share_count(parts, 256) == 31
    assert share_count(parts=12, patch_px=256) == 2
    assert share_count(parts=11, patch_px=256) == 1
