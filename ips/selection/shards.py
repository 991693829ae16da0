"""One huge image over several processes: each scores a strip of its rows, then all hold all logits.

Logits are gathered, normalisers are never reduced, so the winners and scores are those of one process, bit for bit.
Contexts are sums, the same on all processes, and those of one to the rounding of float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from ips.bag import Bag, Chunk, Context
from ips.network.context import merged, tensors
from ips.selection.intake import check_taken


@runtime_checkable
class StripBag(Protocol):
    """A bag that can read a strip of its rows ahead of use."""

    def strip(self, size: int, start: int, stop: int) -> Iterator[Chunk]:
        """Rows `start` to `stop` once, in order, at most `size` rows at a time."""
        ...


def strip(bag: Bag, size: int, start: int, stop: int) -> Iterator[Chunk]:
    """Rows `start` to `stop` of any bag, in order: read ahead where the bag can do that, else through `take`."""
    if isinstance(bag, StripBag):
        yield from bag.strip(size, start, stop)
        return
    for low in range(start, stop, size):
        yield bag.take(torch.arange(low, min(low + size, stop)))


@dataclass(frozen=True)
class Strips:
    """Which rows of a bag this process scores: the `rank`-th of `world` equal strips."""

    group: dist.ProcessGroup
    rank: int
    world: int

    def bounds(self, N: int) -> list[int]:
        """The strips' borders, (world + 1,)."""
        return [N * rank // self.world for rank in range(self.world + 1)]

    def own(self, N: int) -> tuple[int, int]:
        """Where this process's strip begins and ends."""
        low, stop = self.bounds(N)[self.rank : self.rank + 2]
        return low, stop

    def chunks(self, bags: Sequence[Bag], size: int) -> Iterator[tuple[int, Chunk]]:
        """This process's strip of every bag, at most `size` rows at a time; ValueError where a bag gives other rows."""
        for number, bag in enumerate(bags):
            low, stop = self.own(len(bag))
            method = "strip" if isinstance(bag, StripBag) else "take"
            for chunk in strip(bag, size, low, stop):
                given = len(chunk.patches) if method == "strip" else size
                count = min(given, size, stop - low)
                check_taken(chunk, number, torch.arange(low, low + count), method)
                yield number, chunk
                low += count
            if low < stop:
                raise ValueError(f"bags[{number}]: its strip ended before row {low} of {stop}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise after the block where it failed on another process, so that none waits for one that is gone."""
        try:
            yield
        except Exception:
            self._agree(failed=True)
            raise
        self._agree(failed=False)

    def _agree(self, *, failed: bool) -> None:
        flag = torch.tensor([failed], dtype=torch.int32, device=self._device())
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        if flag.item() and not failed:
            raise RuntimeError("the selection failed on another process of the group; see its error")

    def check_alike(self, bags: Sequence[Bag], also: Mapping[str, int]) -> None:
        """Refuse, by ValueError on every process, bags of other lengths, or other numbers `also`, than theirs."""
        self._check_equal({"bags": len(bags), **also})
        self._check_equal({f"patches in bags[{number}]": len(bag) for number, bag in enumerate(bags)})

    def _check_equal(self, numbers: Mapping[str, int]) -> None:
        mine = torch.tensor(list(numbers.values()), device=self._device())
        extremes = torch.cat((mine, -mine))
        dist.all_reduce(extremes, dist.ReduceOp.MAX, self.group)
        high, low = extremes[: len(mine)].tolist(), (-extremes[len(mine) :]).tolist()
        for name, least, most in zip(numbers, low, high, strict=True):
            if least != most:
                raise ValueError(
                    f"group: its processes have {least} to {most} {name}; all must pass the same bags, in the same "
                    "order, and the same model"
                )

    def merge(self, logits: Tensor) -> None:
        """Fill logits (N, ...), of which this process holds its strip, with the other processes' strips."""
        bounds = self.bounds(len(logits))
        longest = max(stop - start for start, stop in pairwise(bounds))
        own = torch.zeros(longest, *logits.shape[1:], dtype=logits.dtype, device=self._device())
        mine = slice(*self.own(len(logits)))
        own[: mine.stop - mine.start] = logits[mine]
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own, self.group)
        for part, (start, stop) in zip(parts, pairwise(bounds), strict=True):
            logits[start:stop] = part[: stop - start]

    def sum(self, context: Context) -> Context:
        """The context of all processes' patches: sums in the order of ranks, the same on all of them."""
        gathered = []
        for part in tensors(context):
            own = part.to(self._device())
            every = [torch.empty_like(own) for _ in range(self.world)]
            dist.all_gather(every, own, self.group)
            gathered.append([x.to(part.device) for x in every])
        return reduce(merged, (Context(*of_rank) for of_rank in zip(*gathered, strict=True)))

    def _device(self) -> torch.device:
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def strips(group: dist.ProcessGroup) -> Strips:
    """The strips of the calling process."""
    return Strips(group, dist.get_rank(group), dist.get_world_size(group))
