"""Who trains on which slide when: a pure function of (seed, epoch, world size, bag sizes, classes).

First the steps, which do not know the world size: so a run that goes on with more or fewer workers still takes every
slide once an epoch, in the same batches. Then the ranks of each step, by the patches that are to be read.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Literal

MAX_WAIT = 0.1
"""Share of a step that ranks may wait for the slowest one before slides are selected together."""

_AHEAD = 1_000_000  # slides

ShardAbove = int | Literal["auto"] | None
"""Which slides all ranks select together: those of more patches; as few as keep waiting below MAX_WAIT; none."""


@dataclass(frozen=True)
class Step:
    """One optimiser step."""

    hands: tuple[tuple[int, ...], ...]
    """For each rank, the indices of the slides that it trains on; zero or more."""
    shared: tuple[int, ...] = ()
    """Those of them, largest first, whose patches all ranks score together."""
    served: frozenset[int] = frozenset()
    """Those of them that nobody scores: their winners are known (`pipeline.training.winners`)."""

    def of(self, drawn: Sequence[int], served: frozenset[int] = frozenset()) -> Step:
        """The step over other indices, `drawn[i]` for each i, of which some are served."""
        hands = tuple(tuple(drawn[index] for index in hand) for hand in self.hands)
        shared = (drawn[index] for index in self.shared)
        return Step(hands, tuple(index for index in shared if index not in served), served)

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
    """The steps of one epoch (`epoch_batches`), equally many on every rank, where every slide is scored (`dealt`)."""
    batches = epoch_batches(sizes, batch_size=batch_size, seed=seed, epoch=epoch, window=window)
    return tuple(dealt(batch, sizes, world_size, shard_above) for batch in batches)


def epoch_batches(
    sizes: Sequence[int], *, batch_size: int, seed: int, epoch: int, window: int = 1
) -> list[Sequence[int]]:
    """The slides of each step of one epoch: each slide once, at most `batch_size` slides a step.

    Steps differ by one slide at most: a last step of one slide would weigh as much as a full one, and its batch
    statistics would be those of that slide. Slides are shuffled by (seed, epoch).

    Args:
        sizes: patches of each bag.
        batch_size: slides a step, over all ranks.
        seed: of the run.
        epoch: from 0.
        window: steps whose slides are exchanged so that slides of one step are alike in size; 1 leaves the shuffle
            as it is.
    """
    order = list(range(len(sizes)))
    generator = random.Random(f"{seed}/{epoch}")
    generator.shuffle(order)
    count = steps_per_epoch(len(order), batch_size)
    bounds = [len(order) * step // count for step in range(count + 1)]
    batches: list[Sequence[int]] = [order[start:stop] for start, stop in pairwise(bounds)]
    if window == 1:
        return batches
    parts = [batches[first : first + window] for first in range(0, count, window)]
    return [batch for part in parts for batch in _alike(part, sizes, generator)]


def dealt(batch: Sequence[int], sizes: Sequence[int], world_size: int, shard_above: ShardAbove) -> Step:
    """Who takes which slide of a step: the largest one left goes to the rank with the fewest patches.

    (Longest processing time.)

    Args:
        batch: the step's slides.
        sizes: patches to read of every slide, by index.
        world_size: ranks.
        shard_above: which slides all ranks select together.
    """
    ranked = sorted(batch, key=lambda index: (-sizes[index], index))
    if world_size == 1 or shard_above is None:
        return _share(ranked, 0, sizes, world_size)
    if shard_above != "auto":
        return _share(ranked, sum(sizes[index] > shard_above for index in ranked), sizes, world_size)
    fair = sum(sizes[index] for index in ranked) / world_size
    steps = (_share(ranked, count, sizes, world_size) for count in range(len(ranked) + 1))
    return next(step for step in steps if fair >= (1 - MAX_WAIT) * step.cost(sizes))  # sharing all is fair


def balanced_slides(classes: Sequence[float], seed: int, epoch: int) -> list[int]:
    """Indices of as many slides as there are, as many of each class, to one.

    A class with too few slides repeats them evenly: none comes twice more often than another of its class. One with
    too many takes turns over the epochs, in an order that the seed fixes.

    Args:
        classes: the class number of every slide; NaN where it is missing, and such slides are a class too.
        seed: of the run.
        epoch: from 0.
    """
    members: defaultdict[float, list[int]] = defaultdict(list)
    for index, number in enumerate(classes):
        members[-1.0 if math.isnan(number) else number].append(index)
    drawn: list[int] = []
    for place, number in enumerate(sorted(members)):
        own = members[number]
        random.Random(f"{seed}/{number}").shuffle(own)
        low, high = (len(classes) * border // len(members) for border in (place, place + 1))
        start = epoch * (high - low)
        drawn += [own[turn % len(own)] for turn in range(start, start + high - low)]
    return drawn


def steps_per_epoch(slides: int, batch_size: int) -> int:
    """Steps of one epoch."""
    return -(-slides // batch_size)


def longest_hand(plans: Iterable[Sequence[Step]], slides: int) -> int:
    """Slides that a rank trains on in one step at most: beside a huge one the others share many small ones.

    Of so many epochs as have a million slides together, which take 10 s to plan; at least of two, since the first may
    be the rest of one that was begun.
    """
    ahead = islice(plans, max(2, _AHEAD // slides))
    return max(len(hand) for plan in ahead for step in plan for hand in step.hands)


def deal(sizes: Sequence[int], world_size: int) -> tuple[tuple[int, ...], ...]:
    """Which bags each rank takes where every one is taken once and nothing is trained: even by patch count."""
    return dealt(range(len(sizes)), sizes, world_size, None).hands


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
