from __future__ import annotations

import pytest
import torch

from ips.selection.baselines import every_patch, random_selection
from tests.ips.nets import bag_of


def test_random_selection_draws_different_rows_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    bags = [bag_of(20), bag_of(3)]
    counts = torch.zeros(20)
    for _ in range(400):
        selection = random_selection(bags, 5, generator)
        assert len(set(selection.index[0].tolist())) == 5
        counts[selection.index[0]] += 1
    assert 60 < counts.min() <= counts.max() < 140  # 100 expected, sd 8.7
    assert sorted(selection.index[1].tolist()) == [-1, -1, 0, 1, 2]
    torch.testing.assert_close(selection.scores[0], torch.full((5,), 1 / 20))
    again = random_selection(bags, 5, torch.Generator().manual_seed(0))
    assert torch.equal(again.index, random_selection(bags, 5, torch.Generator().manual_seed(0)).index)


def test_every_patch_keeps_all_in_order() -> None:
    selection = every_patch([bag_of(4), bag_of(2)])
    assert selection.index.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]
    assert selection.mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_nothing_to_choose_from_is_named() -> None:
    generator = torch.Generator()
    for bags, message in (([], "bags holds no image"), ([bag_of(3), bag_of(0)], r"bags\[1\] is empty")):
        with pytest.raises(ValueError, match=message):
            every_patch(bags)
        with pytest.raises(ValueError, match=message):
            random_selection(bags, 2, generator)
    with pytest.raises(ValueError, match="memory=0 must be a whole number, at least 1"):
        random_selection([bag_of(3)], 0, generator)
