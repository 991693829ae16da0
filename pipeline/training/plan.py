"""Who trains on which slide when: a pure function of (seed, epoch, world size, bag sizes).

First the steps, which do not know the world size: so a run that goes on with more or fewer workers still takes every
slide once an epoch, in the same batches. Then the ranks of each step, by patch count.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal

MAX_WAIT = 0.1
"""Share of a step that ranks may wait for the slowest one before slides are selected together."""

ShardAbove = int | Literal["auto"] | None
"""Which slides all ranks select together: those of more patches; as few as keep waiting below MAX_WAIT; none."""


@dataclass(frozen=True)
class Step:
    """One optimiser step."""

    hands: tuple[tuple[int, ...], ...]
    """For each rank, the indices of the slides that it trains on; zero or more."""
    shared: tuple[int, ...] = ()
    """Those of them, largest first, whose patches all ranks score together."""

    def of(self, drawn: Sequence[int]) -> Step:
        """The step over other indices: `drawn[i]` for each i."""
        hands = tuple(tuple(drawn[index] for index in hand) for hand in self.hands)
        return Step(hands, tuple(drawn[index] for index in self.shared))

    @property
    def slides(self) -> tuple[int, ...]:
        """The slides of all ranks."""
        return tuple(chain.from_iterable(self.hands))

    def cost(self, sizes: Sequence[int]) -> float:
        """Patches that the rank with the most work scores; the others wait for it."""
        together = sum(sizes[index] for index in self.shared)
        alone = (sum(sizes[index] for index in hand if index not in self.shared) for hand in self.hands)
        return together / len(self.hands) + max(alone)


def epoch_plan(
    sizes: Sequence[int],
    *,
    batch_size: int,
    world_size: int,
    seed: int,
    epoch: int,
    window: int = 1,
    shard_above: ShardAbove = None,
) -> tuple[Step, ...]:
    """The steps of one epoch: each slide once, at most `batch_size` slides a step, equal steps on every rank.

    Steps differ by one slide at most: a last step of one slide would weigh as much as a full one, and its batch
    statistics would be those of that slide. Slides are shuffled by (seed, epoch); within a step the largest remaining
    bag goes to the rank with the fewest patches (longest processing time).

    Args:
        sizes: patches of each bag.
        batch_size: slides a step, over all ranks.
        world_size: ranks.
        seed: of the run.
        epoch: from 0.
        window: steps whose slides are exchanged so that slides of one step are alike in size; 1 leaves the shuffle
            as it is.
        shard_above: which slides all ranks select together.
    """
    order = list(range(len(sizes)))
    generator = random.Random(f"{seed}/{epoch}")
    generator.shuffle(order)
    count = steps_per_epoch(len(order), batch_size)
    bounds = [len(order) * step // count for step in range(count + 1)]
    batches = [order[start:stop] for start, stop in pairwise(bounds)]
    if window > 1:
        parts = [batches[first : first + window] for first in range(0, count, window)]
        batches = [batch for part in parts for batch in _alike(part, sizes, generator)]
    return tuple(_deal(batch, sizes, world_size, shard_above) for batch in batches)


def steps_per_epoch(slides: int, batch_size: int) -> int:
    """Steps of one epoch."""
    return -(-slides // batch_size)


def deal(sizes: Sequence[int], world_size: int) -> tuple[tuple[int, ...], ...]:
    """Which bags each rank takes where every one is taken once and nothing is trained: even by patch count."""
    return _deal(range(len(sizes)), sizes, world_size, None).hands


def plan_digest(keys: Sequence[str], sizes: Sequence[int], recipe: str) -> str:
    """Digest of all that determines the plan and the training; stands in every checkpoint."""
    lines = [recipe, *(f"{key} {size}" for key, size in zip(keys, sizes, strict=True))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _alike(batches: Sequence[Sequence[int]], sizes: Sequence[int], generator: random.Random) -> list[list[int]]:
    """The window's slides, each step with neighbours in size; which step comes when is random."""
    ranked = iter(sorted(chain.from_iterable(batches), key=lambda index: (-sizes[index], index)))
    dealt = [[next(ranked) for _ in batch] for batch in batches]
    generator.shuffle(dealt)
    return dealt


def _deal(batch: Sequence[int], sizes: Sequence[int], world_size: int, shard_above: ShardAbove) -> Step:
    ranked = sorted(batch, key=lambda index: (-sizes[index], index))
    if world_size == 1 or shard_above is None:
        return _share(ranked, 0, sizes, world_size)
    if shard_above != "auto":
        return _share(ranked, sum(sizes[index] > shard_above for index in ranked), sizes, world_size)
    fair = sum(sizes[index] for index in ranked) / world_size
    steps = (_share(ranked, count, sizes, world_size) for count in range(len(ranked) + 1))
    return next(step for step in steps if fair >= (1 - MAX_WAIT) * step.cost(sizes))  # sharing all is fair


def _share(ranked: Sequence[int], count: int, sizes: Sequence[int], world_size: int) -> Step:
    """Longest processing time for all but the `count` largest, which go to the ranks with the fewest slides."""
    hands: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for index in ranked[count:]:
        load, rank = loads[0]
        hands[rank].append(index)
        heapq.heapreplace(loads, (load + sizes[index], rank))
    for index in ranked[:count]:
        min(hands, key=len).append(index)
    return Step(tuple(map(tuple, hands)), tuple(ranked[:count]))
