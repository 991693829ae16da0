"""The slides in one rank's hand: what is selected in them, their loss, and how long their patches are waited for.

A slide that is too large for one rank is shared: all ranks score its patches, a strip each; all of them get the
answer, whose winners are those of one rank bit for bit (the context to the rounding of float64), and the rank that has
the slide in its hand trains on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor

from ips.bag import Bag, Chunk, Selection
from ips.learning.losses import LossSum, mean_loss, task_loss
from ips.network.context import each, joined
from ips.network.heads import Kind
from ips.selection.shards import strip

Pick = Callable[[Sequence[int], Sequence[Bag]], Selection]


@dataclass(frozen=True)
class Slides:
    """The training slides, by index: how many patches each has, its targets, and how to open its bag."""

    sizes: Sequence[int]
    targets: Sequence[Mapping[str, float | tuple[float, ...]]]
    """Task -> what `ips.learning.losses.task_loss` reads of one slide; NaN where the label is missing."""
    kinds: Mapping[str, Kind]
    """Task -> kind of its loss."""
    bag: Callable[[int, int], Bag]
    """(slide index, epoch) -> bag, augmented for that epoch."""
    class_weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Task -> (K,), for tasks whose classes weigh differently."""
    announce: Callable[[Sequence[int]], None] = lambda _order: None
    """Told at the start of an epoch which slides this rank will score, in order."""
    names: Sequence[str] = ()
    """Of the slides, for messages; without, their indices."""

    def named(self, indices: Sequence[int]) -> list[str]:
        """Some slides, for a message."""
        return [self.names[index] if self.names else str(index) for index in indices]


def each_image(selection: Selection) -> list[Selection]:
    """A selection in B images as B selections in one, of what is trained on."""
    parts = (torch.split(part, 1) for part in (selection.index, selection.mask, selection.scores))
    images = [Selection(*image) for image in zip(*parts, strict=True)]
    if selection.rest is not None:
        images = [replace(image, rest=rest) for image, rest in zip(images, each(selection.rest), strict=True)]
    if selection.weights is not None:
        own = torch.split(selection.weights, 1)
        images = [replace(image, weights=weights) for image, weights in zip(images, own, strict=True)]
    return images


def select_hand(hand: Sequence[int], bags: Sequence[Bag], known: Mapping[int, Selection], pick: Pick) -> Selection:
    """What is selected in the bags of some slides.

    Args:
        hand: indices of the slides.
        bags: theirs.
        known: slide index -> selection in that one image, of the shared slides.
        pick: selects in the bags of other slides, by their indices.
    """
    others = [place for place, index in enumerate(hand) if index not in known]
    if len(others) == len(hand):
        return pick(hand, bags)
    own = [hand[place] for place in others], [bags[place] for place in others]
    picked = iter(each_image(pick(*own)) if others else [])
    parts = [known[index] if index in known else next(picked) for index in hand]
    index, mask, scores = (torch.cat([getattr(part, name) for part in parts]) for name in ("index", "mask", "scores"))
    rests = [part.rest for part in parts if part.rest is not None]
    weights = [part.weights for part in parts if part.weights is not None]
    return Selection(
        index, mask, scores, rest=joined(rests) if rests else None, weights=torch.cat(weights) if weights else None
    )


def hand_loss(outputs: Mapping[str, Tensor], slides: Slides, mine: Sequence[int], everyone: Sequence[int]) -> Tensor:
    """Mean over tasks of the loss of some slides over the weight of the labelled slides of all ranks.

    Summed over ranks it is the loss of the whole batch; a task without any label in the batch adds 0.
    """
    sums = _sums(outputs, slides, mine)
    blank = {task: torch.zeros(len(everyone), logits.shape[1]) for task, logits in outputs.items()}
    weights = {task: whole.weight for task, whole in _sums(blank, slides, everyone).items()}
    return mean_loss({task: LossSum(sums[task].total, weights[task].to(sums[task].total)) for task in sums})


def _sums(outputs: Mapping[str, Tensor], slides: Slides, which: Sequence[int]) -> dict[str, LossSum]:
    targets = {task: torch.tensor([slides.targets[i][task] for i in which]) for task in slides.kinds}
    return task_loss(outputs, targets, slides.kinds, slides.class_weights)


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
