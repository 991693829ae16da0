"""The slides in one rank's hand: what is selected in them, and how long their patches are waited for.

A slide that is too large for one rank is shared: all ranks score its patches, a strip each; all of them get the
answer, whose winners are those of one rank bit for bit (the context to the rounding of float64), and the rank that has
the slide in its hand trains on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from ips.bag import Bag, Chunk, Selection
from ips.network.context import each, joined
from ips.selection.shards import strip

Pick = Callable[[Sequence[Bag]], Selection]


def each_image(selection: Selection) -> list[Selection]:
    """A selection in B images as B selections in one, of what is trained on."""
    parts = (torch.split(part, 1) for part in (selection.index, selection.mask, selection.scores))
    images = [Selection(*image) for image in zip(*parts, strict=True)]
    if selection.rest is None:
        return images
    return [replace(image, rest=rest) for image, rest in zip(images, each(selection.rest), strict=True)]


def select_hand(hand: Sequence[int], bags: Sequence[Bag], known: Mapping[int, Selection], pick: Pick) -> Selection:
    """What is selected in the bags of some slides.

    Args:
        hand: indices of the slides.
        bags: theirs.
        known: slide index -> selection in that one image, of the shared slides.
        pick: selects in the other bags.
    """
    others = [place for place, index in enumerate(hand) if index not in known]
    if len(others) == len(hand):
        return pick(bags)
    picked = iter(each_image(pick([bags[place] for place in others])) if others else [])
    parts = [known[index] if index in known else next(picked) for index in hand]
    index, mask, scores = (torch.cat([getattr(part, name) for part in parts]) for name in ("index", "mask", "scores"))
    rests = [part.rest for part in parts if part.rest is not None]
    return Selection(index, mask, scores, rest=joined(rests) if rests else None)


class Waits:
    """Counts the seconds that the loop waits for patches."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watched(self, bag: Bag) -> Bag:
        """The bag, with its waits counted."""
        return _Watched(bag, self)


class _Watched:
    """A bag whose reader is timed while it waits; what is read ahead meanwhile costs nothing."""

    def __init__(self, bag: Bag, waits: Waits) -> None:
        self._bag, self._waits = bag, waits

    def __len__(self) -> int:
        return len(self._bag)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Those of the bag."""
        return self._timed(self._bag.chunks(size))

    def strip(self, size: int, start: int, stop: int) -> Iterator[Chunk]:
        """As the bag can."""
        return self._timed(strip(self._bag, size, start, stop))

    def _timed(self, source: Iterator[Chunk]) -> Iterator[Chunk]:
        while True:
            began = perf_counter()
            try:
                chunk = next(source)
            except StopIteration:
                return
            finally:
                self._waits.seconds += perf_counter() - began
            yield chunk

    def take(self, rows: Tensor) -> Chunk:
        """As the bag does."""
        began = perf_counter()
        try:
            return self._bag.take(rows)
        finally:
            self._waits.seconds += perf_counter() - began
