"""Who trains on which slide when: a pure function of (seed, epoch, world size, bag sizes)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from itertools import pairwise

Step = tuple[tuple[int, ...], ...]
"""For each rank, the indices of the slides that it takes in this step; zero or more."""


def epoch_plan(sizes: Sequence[int], *, batch_size: int, world_size: int, seed: int, epoch: int) -> tuple[Step, ...]:
    """The steps of one epoch: each slide once, at most `batch_size` slides a step, equal steps on every rank.

    Steps differ by one slide at most: a last step of one slide would weigh as much as a full one, and its batch
    statistics would be those of that slide. Slides are shuffled by (seed, epoch) and dealt within a step by longest
    processing time: the largest remaining bag goes to the rank with the fewest patches. `sizes` are patches a bag.
    """
    order = list(range(len(sizes)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    steps = steps_per_epoch(len(order), batch_size)
    bounds = [len(order) * step // steps for step in range(steps + 1)]
    batches = [order[start:stop] for start, stop in pairwise(bounds)]
    return tuple(_deal(batch, sizes, world_size) for batch in batches)


def steps_per_epoch(slides: int, batch_size: int) -> int:
    """Steps of one epoch."""
    return -(-slides // batch_size)


def plan_digest(keys: Sequence[str], sizes: Sequence[int], recipe: str) -> str:
    """Digest of all that determines the plan and the training; stands in every checkpoint."""
    lines = [recipe, *(f"{key} {size}" for key, size in zip(keys, sizes, strict=True))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _deal(batch: Sequence[int], sizes: Sequence[int], world_size: int) -> Step:
    hands: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for slide in sorted(batch, key=lambda index: (-sizes[index], index)):
        rank = loads.index(min(loads))
        hands[rank].append(slide)
        loads[rank] += sizes[slide]
    return tuple(tuple(hand) for hand in hands)
