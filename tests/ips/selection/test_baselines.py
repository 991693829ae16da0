from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import nn

from ips.learning.gradient import bounded_backward
from ips.network.aggregator import Aggregator
from ips.network.model import IPSModel
from ips.network.pooling import GatedAttention, MeanPool
from ips.selection.baselines import HalfByScore, RandomDraw, every_patch, random_selection, transferred
from ips.selection.select import assemble, gather, select
from tests.ips.nets import TinyEncoder, bag_of, tiny_model


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


def test_half_by_score_is_half_of_the_best_and_half_of_the_others() -> None:
    keys = torch.linspace(0, -8, 30, dtype=torch.float64)[torch.randperm(30)]
    best = set(keys.argsort(descending=True)[:7].tolist())
    rule = HalfByScore(torch.Generator().manual_seed(0))
    seen: set[int] = set()
    for _ in range(60):
        rows = rule(keys, 7).tolist()
        assert len(set(rows)) == 7
        assert len(set(rows) & best) == 4
        assert set(rows[:4]) <= best
        seen |= set(rows)
    assert seen == set(range(30))
    assert rule(keys, 7).tolist() != rule(keys, 7).tolist()
    assert sorted(rule(keys[:5], 7).tolist()) == list(range(5))
    assert sorted(rule(keys, 30).tolist()) == list(range(30))
    assert len(set(rule(keys, 29).tolist())) == 16  # 15 of the 29 best, and the one other


def test_half_by_score_prefers_high_scores() -> None:
    keys = torch.tensor([0.9, 0.09, 0.01], dtype=torch.float64).log()
    rule = HalfByScore(torch.Generator().manual_seed(0))
    first = torch.bincount(torch.cat([rule(keys, 2)[:1] for _ in range(4000)]), minlength=2)
    softmax = torch.tensor([0.9, 0.09]).softmax(dim=0)  # of the scores, as DBPS has it: nearly even
    assert first[2:].sum() == 0
    torch.testing.assert_close(first / 4000, softmax, rtol=0, atol=0.03)


def test_drawn_rows_win_whatever_they_score() -> None:
    model, bags = tiny_model(), [bag_of(20), bag_of(3)]
    drawn = select(model, bags, 5, 8, draw=RandomDraw(torch.Generator().manual_seed(1)))
    again = RandomDraw(torch.Generator().manual_seed(1))
    assert drawn.index[0].tolist() == again(torch.zeros(20), 5).tolist()
    everyone = select(model, bags, 20, 8)
    scores = dict(zip(everyone.index[0].tolist(), everyone.scores[0].tolist(), strict=True))
    assert drawn.scores[0].tolist() == [scores[row] for row in drawn.index[0].tolist()]


@pytest.mark.parametrize("rows", [[1, 1], [0, 5], [-1], [0, 1, 2]])
def test_a_draw_of_other_rows_is_refused(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="it must give at most 2 different rows of 5"):
        select(tiny_model(), [bag_of(5)], 2, 3, draw=lambda _keys, _memory: torch.tensor(rows))


@pytest.mark.parametrize(
    ("weights", "context", "problem"),
    [
        ([1.0], "rest", "it must give a finite one for each row"),
        ([1.0, float("nan")], "rest", "it must give a finite one for each row"),
        ([1.0, 2.0], "whole", "they need context='rest'"),
        ([1.0, 2.0], None, "they need context='rest'"),
    ],
)
def test_weights_that_are_no_numbers_or_not_asked_for_are_refused(
    weights: list[float], context: Literal["whole", "rest"] | None, problem: str
) -> None:
    def draw(_keys: torch.Tensor, _memory: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([4, 0]), torch.tensor(weights)

    with pytest.raises(ValueError, match=problem):
        select(tiny_model(), [bag_of(5)], 2, 3, draw=draw, context=context)


def test_winners_of_a_coarse_tiling_are_looked_at_closely() -> None:
    """Patches of 4 units and of 1; (column, row) of the fine ones in another order."""
    coarse = torch.tensor([[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]).float()
    fine = torch.cartesian_prod(torch.arange(12), torch.arange(8)).flip(0).float()
    chosen = assemble([(torch.tensor([4, 0]), torch.zeros(2))], 3, [6])
    found = transferred(chosen, [coarse], [fine], 4.0)
    assert found.mask.tolist() == [[True, True, False]]
    assert fine[found.index[0, :2]].tolist() == [[6, 6], [2, 2]]  # the patches around the middles
    torch.testing.assert_close(found.scores[0, :2], torch.full((2,), 0.5))
    same = transferred(assemble([(torch.tensor([0, 1]), torch.zeros(2))], 2, [6]), [coarse], [coarse // 2], 0.5)
    assert same.mask.tolist() == [[True, False]]  # both lie in one patch
    with pytest.raises(ValueError, match=r"onto\[0\]: no patch of it lies where a winner is; are scale=40"):
        transferred(chosen, [coarse], [fine], 40.0)
    with pytest.raises(ValueError, match="positions has 1 images, onto 2, the selection 1"):
        transferred(chosen, [coarse], [fine, fine], 4.0)


@pytest.mark.parametrize("pool", [GatedAttention(12, 2, 5), MeanPool(2), Aggregator(12, 2, 2, 3, 3, 5)])
def test_all_patches_are_trained_on_in_the_memory_of_a_chunk(pool: nn.Module) -> None:
    """ABMIL, the mean and full attention over every patch, encoded 5 at a time."""
    model = IPSModel(TinyEncoder(12), pool, {"a": nn.Linear(12, 1), "b": nn.Linear(12, 3)}).double().eval()
    bags, plain = [bag_of(23, 1), bag_of(4, 2)], copy.deepcopy(model)
    encoded: list[int] = []
    model.encoder.register_forward_hook(lambda _module, args, _out: encoded.append(len(args[0])))

    def loss(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([logits.square().mean() for logits in outputs.values()]).sum()

    bounded_backward(model, bags, every_patch(bags), loss, 5)
    assert max(encoded) == 5
    assert sum(encoded) == 2 * 27
    loss(plain(gather(bags, every_patch(bags), "cpu"))).backward()  # type: ignore[no-untyped-call]
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)
