"""One reading for several models: every chunk once, each model as if alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ips.bag import Bag, Chunk, TensorBag
from pipeline.bags.shared import together

N = 23


class Counting(TensorBag):
    """Counts the rows that are read, and reuses the memory of a chunk only once it is free."""

    def __init__(self, broken_at: int | None = None) -> None:
        super().__init__(torch.arange(N * 3, dtype=torch.float32).view(N, 3), torch.rand(N, 2))
        self.read = 0
        self._broken_at = broken_at

    def chunks(self, size: int) -> Iterator[Chunk]:
        for chunk in super().chunks(size):
            self.read += len(chunk.index)
            if self._broken_at is not None and self.read > self._broken_at:
                raise OSError("damaged")
            yield chunk


def _sizes(size: int) -> Callable[[Bag], list[list[int]]]:
    def work(bag: Bag) -> list[list[int]]:
        found = []
        for chunk in bag.chunks(size):
            assert torch.equal(chunk.patches[:, 0], chunk.index.float() * 3)
            assert chunk.positions is not None
            assert len(chunk.positions) == len(chunk.index)
            found.append(chunk.index.tolist())
        return found

    return work


@pytest.mark.parametrize("sizes", [(5, 5), (7, 5, 3), (1, 23, 40), (4,)])
def test_everyone_gets_chunks_of_its_own_size_from_one_reading(sizes: tuple[int, ...]) -> None:
    bag = Counting()
    found, seconds, _ = together(bag, [_sizes(size) for size in sizes])
    assert found == [[list(range(N))[at : at + size] for at in range(0, N, size)] for size in sizes]
    assert bag.read == N
    assert len(seconds) == len(sizes)


def test_one_computes_at_a_time() -> None:
    running, most, lock = [0], [0], threading.Lock()

    def work(bag: Bag) -> int:
        for chunk in bag.chunks(4):
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            float(chunk.patches.double().pow(2).sum())
            with lock:
                running[0] -= 1
        return len(bag)

    together(Counting(), [work] * 5)
    assert most == [1]


def test_what_one_raises_is_its_own() -> None:
    def fails(bag: Bag) -> list[list[int]]:
        next(iter(bag.chunks(5)))
        raise ValueError("mine")

    bag = Counting()
    found, _, _ = together(bag, [fails, _sizes(6), fails])
    assert str(found[0]) == str(found[2]) == "mine"
    assert isinstance(found[1], list)
    assert sum(map(len, found[1])) == N
    assert bag.read == N


def test_what_the_bag_raises_is_everyone_s() -> None:
    def patient(bag: Bag) -> str:
        try:
            return str(sum(len(chunk.index) for chunk in bag.chunks(5)))
        except OSError as error:
            return f"met {error}"

    found, _, _ = together(Counting(broken_at=12), [_sizes(5), patient])
    assert isinstance(found[0], OSError)
    assert found[1] == "met damaged"


def test_who_reads_twice_waits_for_the_others_and_who_takes_needs_no_chunk() -> None:
    def twice(bag: Bag) -> int:
        return sum(len(chunk.index) for _ in range(2) for chunk in bag.chunks(5))

    def takes(bag: Bag) -> list[float]:
        values: Tensor = bag.take(torch.tensor([3, 1])).patches[:, 0]
        return values.tolist()

    bag = Counting()
    found, _, _ = together(bag, [twice, twice, takes])
    assert found == [2 * N, 2 * N, [9.0, 3.0]]
    assert bag.read == 2 * N


def test_none_is_a_result_too() -> None:
    assert together(Counting(), [lambda bag: None, lambda bag: len(bag)])[0] == [None, N]
