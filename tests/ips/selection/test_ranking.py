from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ips.selection import ranking
from ips.selection.ranking import best, log_normalisers, log_scores


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
