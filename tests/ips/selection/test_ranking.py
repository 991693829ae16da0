from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ips.selection import ranking
from ips.selection.ranking import ByAttention, best, chances, in_turns, log_normalisers, log_scores, winners
from tests.oracle import taken_in_turns


def test_scores_are_the_mean_softmax() -> None:
    logits = torch.randn(211, 5) * 4
    keys = log_scores(logits, log_normalisers(logits))
    torch.testing.assert_close(keys.exp(), logits.double().softmax(dim=0).mean(dim=1))


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(211, 5) * 4
    whole = log_scores(logits, log_normalisers(logits))
    monkeypatch.setattr(ranking, "_BLOCK", 17)
    torch.testing.assert_close(log_scores(logits, log_normalisers(logits)), whole, rtol=1e-13, atol=0)


def test_hopeless_patches_still_have_an_order() -> None:
    """Softmax weights underflow at exp(-800); their logs do not."""
    logits = torch.tensor([[0.0], [-900.0], [-800.0], [-1000.0]])
    keys = log_scores(logits, log_normalisers(logits))
    assert best(keys, torch.arange(4), 4).tolist() == [0, 2, 1, 3]


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 10**9)), min_size=1, max_size=40, unique_by=lambda p: p[1]),
    st.integers(1, 50),
)
def test_best_is_by_score_then_by_smaller_row(pairs: list[tuple[int, int]], memory: int) -> None:
    keys = torch.tensor([float(score) for score, _ in pairs], dtype=torch.float64)
    index = torch.tensor([row for _, row in pairs])
    expected = sorted(range(len(pairs)), key=lambda n: (-pairs[n][0], pairs[n][1]))[:memory]
    assert best(keys, index, memory).tolist() == expected


def test_which_heads_agree_decides() -> None:
    """The counterexample of windowed averaging: a (6, 1), b (1, 5), c (30, .1), d (.1, .1) give c over all."""
    logits = torch.tensor([[6, 1], [1, 5], [30, 0.1], [0.1, 0.1]]).log()
    keys = log_scores(logits, log_normalisers(logits))
    torch.testing.assert_close(
        keys.exp().float(),
        torch.tensor([6 / 37.1 + 1 / 6.2, 1 / 37.1 + 5 / 6.2, 30 / 37.1 + 0.1 / 6.2, 0.1 / 37.1 + 0.1 / 6.2]) / 2,
    )
    assert best(keys, torch.arange(4), 1).tolist() == [1]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 70), st.sampled_from([0.0, 0.3, 3.0, 300.0]), st.integers(0, 10**6))
def test_chances_add_up_and_follow_the_scores(N: int, memory: int, spread: float, seed: int) -> None:
    keys = spread * torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    chance = chances(keys, memory)
    certain = chance == 1
    assert ((chance >= 0) & (chance <= 1)).all()
    assert float(chance.sum()) == pytest.approx(min(N, memory))
    if memory >= N:
        assert certain.all()
        return
    ratio = (keys - keys.max()).exp().clamp(min=1e-200) / chance
    if int(certain.sum()) == memory:  # nothing is left to draw but what weighs less than rounding
        assert not chance[~certain].any()
        return
    others = ratio[~certain]
    torch.testing.assert_close(others, others[:1].expand_as(others), rtol=1e-9, atol=0)
    assert not certain.any() or ratio[certain].min() >= others[0] * (1 - 1e-9)


def test_draws_come_as_often_as_their_chances_say() -> None:
    keys = torch.tensor([3.0, 0.0, -1.0, 0.5, -30.0, 0.2, -0.5], dtype=torch.float64)
    chance, counts = chances(keys, 3), torch.zeros(7)
    assert chance[0] == 1
    for seed in range(800):
        rows, weights = ByAttention(seed)(keys, 3)
        assert len(set(rows.tolist())) == 3
        assert rows[0] == 0
        assert keys[rows].diff().max() <= 0  # best first
        torch.testing.assert_close(weights, (1 / chance[rows]).float())
        counts[rows] += 1
    torch.testing.assert_close(counts / 800, chance.float(), rtol=0, atol=0.07)  # four deviations


def test_a_draw_is_a_function_of_scores_and_seed() -> None:
    keys = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first = ByAttention(5)(keys, 20)[0].tolist()
    torch.rand(9)  # of other random numbers it takes none
    assert ByAttention(5)(keys, 20)[0].tolist() == first
    assert ByAttention(5)(keys * (1 + 1e-13), 20)[0].tolist() == first  # as another number of processes has them
    assert ByAttention(6)(keys, 20)[0].tolist() != first
    assert ByAttention(5)(keys.flip(0), 20)[0].tolist() != first
    assert sorted(ByAttention(5)(keys, 400)[0].tolist()) == list(range(300))


def test_a_draw_of_scores_that_differ_by_rounding_is_the_same() -> None:
    """As those of another number of processes, of another order of sums: nothing hangs on the order of all scores."""
    generator = torch.Generator().manual_seed(1)
    keys, noise = torch.randn(2, 20_011, dtype=torch.float64, generator=generator)
    rows, again = (ByAttention(7)(one, 64)[0].tolist() for one in (keys, keys + 1e-7 * noise))
    assert len(set(rows) & set(again)) >= 63


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 50), st.sampled_from([1, 3, 1000]), st.integers(0, 10**6))
def test_heads_take_in_turn_by_the_definition(N: int, J: int, memory: int, levels: int, seed: int) -> None:
    """Also where many are equal, and rows lie in any order."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-levels, levels, (N, J), generator=generator).float()
    expected = taken_in_turns(logits.tolist(), memory)
    assert len(set(expected)) == min(N, memory)
    assert in_turns(logits, torch.arange(N), memory).tolist() == expected
    order = torch.randperm(N, generator=generator)
    assert order[in_turns(logits[order], order, memory)].tolist() == expected
    rows, keys = winners(logits, torch.arange(N), memory, "heads")
    assert sorted(rows.tolist()) == sorted(expected)
    assert torch.equal(keys, log_scores(logits, log_normalisers(logits))[rows])
    assert (keys.diff() <= 0).all()


def test_one_head_is_not_outvoted() -> None:
    """Of eight heads one has found row 5; the others are loud about rows 0 and 1."""
    logits = torch.zeros(30, 8)
    logits[:2, :7], logits[5, 7] = 3.0, 1.0
    assert winners(logits, torch.arange(30), 8, "heads")[0][:3].tolist() == [0, 1, 5]
    crowd = logits.clone()
    crowd[10:16, :7] = 2.0  # by the mean these are all before it
    assert 5 not in winners(crowd, torch.arange(30), 8, "mean")[0]
    assert 5 in winners(crowd, torch.arange(30), 8, "heads")[0]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 12), st.integers(0, 10**6))
def test_what_is_not_taken_of_some_is_not_taken_of_more(N: int, J: int, memory: int, seed: int) -> None:
    """So a stream that keeps M patches loses none, whatever its pieces and their order."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-4, 4, (N, J), generator=generator).float()
    kept = torch.empty(0, dtype=torch.int64)
    pieces = int(torch.randint(1, 9, (), generator=generator))
    for part in torch.split(torch.randperm(N, generator=generator), pieces):
        pool = torch.cat((kept, part))
        kept = pool[in_turns(logits[pool], pool, memory)]
    assert kept.tolist() == taken_in_turns(logits.tolist(), memory)
