"""Which slides an epoch trains on: a pure function of (seed, epoch, classes)."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence


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
