from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ips.selection.unique
from ips.selection.unique import constant_rows, distinct_rows, row_hashes, unique_rows
from tests.ips.nets import bag_of


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=40), st.sampled_from([(3, 4, 2), (1, 5, 3), (3, 5, 2), (3, 5, 5)])
)
def test_every_distinct_patch_stands_once(which: list[int], shape: tuple[int, int, int]) -> None:
    kinds = torch.randint(0, 256, (6, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    patches = kinds[torch.tensor(which)]
    rows, inverse = unique_rows(patches)
    assert len(rows) == len(set(which))
    assert rows.tolist() == sorted({which.index(w) for w in which})
    assert torch.equal(patches[rows][inverse], patches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
def test_any_type_and_features(dtype: torch.dtype) -> None:
    features = torch.randint(0, 3, (50, 2)).to(dtype)
    rows, inverse = unique_rows(features)
    assert len(rows) == len({tuple(row) for row in features.tolist()})
    assert torch.equal(features[rows][inverse], features)


def test_colliding_hashes_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = bag_of(9).patches[torch.tensor([0, 1, 0, 2, 1, 1, 8, 0])]
    monkeypatch.setattr(ips.selection.unique, "_keys", lambda count, _device: torch.zeros(count, dtype=torch.int64))
    rows, inverse = unique_rows(patches)
    assert torch.equal(patches[rows][inverse], patches)
    assert len(rows) < len(patches)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_patches_that_are_alike_at_a_glance_are_looked_at_whole(which: list[int]) -> None:
    kinds = bag_of(1).patches.repeat(6, 1, 1, 1)
    kinds[torch.arange(6), 1, 4, torch.arange(9, 15)] += 1  # the first hash reads every 11th byte
    assert len(torch.unique(kinds.flatten(1)[:, ::11], dim=0)) == 1
    patches = kinds[torch.tensor(which)]
    rows, inverse = unique_rows(patches)
    assert rows.tolist() == sorted({which.index(w) for w in which})
    assert torch.equal(patches[rows][inverse], patches)


def test_one_bit_makes_another_patch() -> None:
    patches = bag_of(1).patches.repeat(2, 1, 1, 1)
    patches[1, 2, 12, 16] ^= 1
    assert len(unique_rows(patches)[0]) == 2


def test_constant_is_every_pixel_in_every_channel() -> None:
    patches = torch.zeros(6, 3, 5, 7, dtype=torch.uint8)
    patches[1] = torch.tensor([9, 8, 7], dtype=torch.uint8).view(3, 1, 1)
    patches[2, 1, 2, 3] = 1
    patches[3, 0, 0, 0] = 1
    patches[4, 2, -1, -1] = 1
    assert constant_rows(patches).tolist() == [True, True, False, False, False, True]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize(("h", "w"), [(5, 7), (1, 1), (3, 8), (2, 2)])
@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_constant_rows_by_definition(dtype: torch.dtype, h: int, w: int, share: float) -> None:
    generator = torch.Generator().manual_seed(h)
    patches = torch.randint(0, 2, (60, 3, h, w), generator=generator).to(dtype)
    one_colour = torch.rand(60, generator=generator) < share
    patches[one_colour] = patches[one_colour][:, :, :1, :1]
    expected = [all(len(set(plane.flatten().tolist())) == 1 for plane in patch) for patch in patches]
    assert constant_rows(patches).tolist() == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_distinct_rows_stand_for_all_with_one_colours_last(which: list[int]) -> None:
    kinds = torch.randint(0, 256, (6, 3, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    kinds[3], kinds[4] = 0, torch.tensor([9, 8, 7], dtype=torch.uint8).view(3, 1, 1)
    patches = kinds[torch.tensor(which)]
    rows, inverse, flat = distinct_rows(patches)
    assert len(rows) == len(set(which))
    assert torch.equal(patches[rows][inverse], patches)
    assert flat == len(set(which) & {3, 4})
    assert constant_rows(patches[rows]).tolist() == [False] * (len(rows) - flat) + [True] * flat


def test_a_row_has_the_hash_of_its_bytes() -> None:
    patches = torch.rand(9, 3, 5, 3)
    hashes = row_hashes(patches)
    assert torch.equal(row_hashes(patches.flip(0)), hashes.flip(0))
    for place in (0, -1):
        other = patches.clone().flatten(1)
        other[4, place] += 1e-3
        assert (row_hashes(other) == hashes).tolist() == [row != 4 for row in range(9)]
    assert (row_hashes(patches.flip(-1)) != hashes).all()
