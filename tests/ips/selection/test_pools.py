from __future__ import annotations

import torch

from ips.selection.pools import LogitCache, Window
from ips.selection.ranking import winners


def test_the_cache_ranks_over_the_whole_image_in_any_order() -> None:
    logits = torch.randn(30, 4) * 3
    cache = LogitCache(30, 4)
    for part in torch.randperm(30).tensor_split(4):
        cache.add(part, logits[part])
    rows, keys = cache.winners(7)
    scores = logits.double().softmax(dim=0).mean(dim=1)
    assert rows.tolist() == scores.argsort(descending=True)[:7].tolist()
    torch.testing.assert_close(keys.exp(), scores[rows])


def test_the_window_is_the_counterexample() -> None:
    """J = 2, e^l = a (6, 1), b (1, 5), c (30, .1), d (.1, .1), M = I = 1: every order gives a, truth is b."""
    logits = torch.tensor([[6, 1], [1, 5], [30, 0.1], [0.1, 0.1]]).log()
    for order in torch.cartesian_prod(*[torch.arange(4)] * 4):
        if len(set(order.tolist())) < 4:
            continue
        window, cache = Window(1, 1, 2), LogitCache(4, 2)
        for row in order:
            for pool in (window, cache):
                pool.add(row.view(1), logits[row].view(1, 2))
        assert window.winners(1)[0].tolist() == [0]
        assert cache.winners(1)[0].tolist() == [1]


def test_the_window_does_not_depend_on_how_rows_arrive() -> None:
    logits, together, apart = torch.randn(50, 3) * 4, Window(5, 7, 3), Window(5, 7, 3)
    together.add(torch.arange(50), logits)
    for row in range(50):
        apart.add(torch.tensor([row]), logits[row : row + 1])
    assert together.winners(5)[0].tolist() == apart.winners(5)[0].tolist()


def test_a_short_image_stays_whole() -> None:
    window = Window(10, 3, 2)
    window.add(torch.arange(4), torch.randn(4, 2))
    assert sorted(window.winners(10)[0].tolist()) == [0, 1, 2, 3]


def test_what_heads_take_in_turn_is_the_same_of_a_window() -> None:
    logits, orders = torch.randn(90, 4) * 3, [torch.arange(90), torch.randperm(90)]
    cache = LogitCache(90, 4, rank="heads")
    cache.add(torch.arange(90), logits)
    rows = set(cache.winners(7)[0].tolist())
    assert rows != set(winners(logits, torch.arange(90), 7, "mean")[0].tolist())
    for order, chunk in zip(orders, (1, 13), strict=True):
        window = Window(7, chunk, 4, rank="heads")
        for part in torch.split(order, 5):
            window.add(part, logits[part])
        assert set(window.winners(7)[0].tolist()) == rows
        assert window.scored <= 7 + chunk
