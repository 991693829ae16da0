from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ips.bag import Bag, Chunk, Context, Selection, TensorBag
from ips.selection.shards import strip
from pipeline.training.hands import Waits, each_image, select_hand


def _bags(*lengths: int) -> list[Bag]:
    return [TensorBag(torch.rand(length, 4)) for length in lengths]


def _by_length(bags: Sequence[Bag]) -> Selection:
    """Two rows a bag, that tell its length."""
    rows = torch.tensor([[len(bag), -1] for bag in bags])
    return Selection(rows, rows >= 0, rows / 10)


def test_shared_slides_stand_where_the_hand_has_them() -> None:
    bags = _bags(3, 5, 7, 9)
    known = dict(zip([40, 20], each_image(_by_length([bags[3], bags[1]])), strict=True))
    asked: list[tuple[list[int], list[int]]] = []

    def pick(hand: Sequence[int], others: Sequence[Bag]) -> Selection:
        asked.append(([*hand], [len(bag) for bag in others]))
        return _by_length(others)

    found = select_hand([10, 20, 30, 40], bags, known, pick)
    whole = _by_length(bags)
    assert asked == [([10, 30], [3, 7])]
    assert torch.equal(found.index, whole.index)
    assert torch.equal(found.mask, whole.mask)
    assert torch.equal(found.scores, whole.scores)


def test_a_hand_of_shared_slides_only_selects_nothing_more() -> None:
    bags = _bags(3, 5)
    known = dict(zip([1, 2], each_image(_by_length(bags)), strict=True))
    found = select_hand([2, 1], bags[::-1], known, _refuse)
    assert found.index[:, 0].tolist() == [5, 3]


def _refuse(_hand: Sequence[int], _bags: Sequence[Bag]) -> Selection:
    raise AssertionError("nothing is left to select")


def test_the_rest_and_the_weights_of_each_slide_stay_with_it() -> None:
    bags = _bags(3, 5, 7)

    def with_rest(bags: Sequence[Bag]) -> Selection:
        sizes = torch.tensor([float(len(bag)) for bag in bags], dtype=torch.float64)
        rest = Context(sizes.view(-1, 1), sizes.view(-1, 1, 1), sizes.view(-1, 1, 1, 1))
        return replace(_by_length(bags), rest=rest, weights=sizes.unsqueeze(1) / torch.tensor([1, 2]))

    known = {20: each_image(with_rest(bags[1:2]))[0]}
    for hand, wanted in (([10, 20, 30], [3, 5, 7]), ([20], [5]), ([10, 30], [3, 7])):
        mine = [bags[n] for n in (hand_index // 10 - 1 for hand_index in hand)]
        selection = select_hand(hand, mine, known, lambda _hand, bags: with_rest(bags))
        found = selection.rest
        assert found is not None
        assert selection.weights is not None
        assert selection.weights.tolist() == [[n, n / 2] for n in wanted]
        assert found.second is not None
        assert [found.log_mass.flatten().tolist(), found.second.flatten().tolist()] == [wanted, wanted]


class _SlowBag:
    """Gives each chunk after 20 ms."""

    def __len__(self) -> int:
        return 3

    def chunks(self, size: int) -> Iterator[Chunk]:
        for start in range(0, 3, size):
            time.sleep(0.02)
            yield self.take(torch.arange(start, min(start + size, 3)))

    def take(self, rows: Tensor) -> Chunk:
        time.sleep(0.02)
        return Chunk(torch.zeros(len(rows), 4), rows)


def test_only_waiting_for_patches_is_counted() -> None:
    waits = Waits()
    bag = waits.watched(_SlowBag())
    began = time.perf_counter()
    rows = []
    for chunk in bag.chunks(1):
        rows += chunk.index.tolist()
        time.sleep(0.05)
    assert rows == [0, 1, 2]
    assert len(bag) == 3
    assert waits.seconds >= 0.12  # twice 20 ms a chunk
    assert time.perf_counter() - began - waits.seconds >= 0.15
    before = waits.seconds
    assert [chunk.index.tolist() for chunk in strip(bag, 1, 1, 3)] == [[1], [2]]
    assert waits.seconds >= before + 0.04
    before = waits.seconds
    assert bag.take(torch.tensor([2])).index.tolist() == [2]
    assert waits.seconds >= before + 0.02
