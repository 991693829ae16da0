"""Winners that serve several visits of their slide, so that not every visit scores all its patches.

A slide's winners serve `train.reselect_every` visits, then it is scored again. Its first ones serve fewer, by turns
that have equally many patches: so every epoch after the first scores one part of the cohort, and costs what the next
one does. Which visits score follows from counters, which all ranks have, and checkpoints; so who trains on what is
known before an epoch begins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ips.bag import Selection
from pipeline.training.plan import Step, deal
from pipeline.training.ranks import Ranks

_NEVER = -1  # scored


@dataclass(frozen=True)
class Turns:
    """When each slide is scored."""

    every: int
    """Visits that winners serve, the one that found them included."""
    first: tuple[int, ...]
    """Of each slide: visits after the first that the first winners serve."""
    left: list[int]
    """Of each slide: visits that the winners at hand still serve."""

    @classmethod
    def of(cls, sizes: Sequence[int], every: int) -> Turns:
        """Of slides with so many patches, before any visit."""
        first = [0] * len(sizes)
        for turn, slides in enumerate(deal(sizes, every)):
            for slide in slides:
                first[slide] = turn
        return cls(every, tuple(first), [_NEVER] * len(sizes))

    def copy(self) -> Turns:
        """To look ahead with."""
        return replace(self, left=list(self.left))

    def visit(self, slides: Collection[int]) -> frozenset[int]:
        """Count a step's visits; those of the slides whose winners serve it. The others are scored."""
        served = frozenset(slide for slide in slides if self.left[slide] > 0)
        for slide in set(slides):
            if slide in served:
                self.left[slide] -= 1
            else:
                self.left[slide] = self.first[slide] if self.left[slide] == _NEVER else self.every - 1
        return served


class Winners:
    """What every training slide was last found to have, the same on all ranks.

    Args:
        sizes: patches of each slide.
        memory: M.
        every: visits that winners serve.
    """

    def __init__(self, sizes: Sequence[int], memory: int, every: int) -> None:
        self.turns = Turns.of(sizes, every)
        self.rows = torch.full((len(sizes), memory), -1, dtype=torch.int32)
        """(slides, M), best first; -1 where there is none."""

    @property
    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"rows": self.rows.clone(), "left": torch.tensor(self.turns.left, dtype=torch.int32)}

    def load(self, state: Mapping[str, Tensor] | None) -> None:
        """Go on from a checkpoint; ValueError where it has no winners or those of other slides."""
        if state is None:
            raise ValueError("it holds no winners, and train.reselect_every goes on from them")
        rows, left = state["rows"], state["left"]
        if rows.shape != self.rows.shape or left.shape != (len(rows),):
            raise ValueError(f"winners of shape {tuple(rows.shape)} for slides and M of {tuple(self.rows.shape)}")
        self.rows, self.turns = rows.clone(), replace(self.turns, left=left.tolist())

    def of(self, slide: int) -> Selection:
        """A slide's winners, as a selection in one image; what they scored is not kept."""
        index = self.rows[slide].long().unsqueeze(0)
        return Selection(index, index >= 0, torch.full(index.shape, torch.nan))

    def note(self, step: Step, found: Mapping[int, Tensor], ranks: Ranks, device: torch.device) -> tuple[float, ...]:
        """Count a step's visits and take over what was found in them; all ranks call this together.

        Args:
            step: what was done.
            found: slide -> rows (M,) of those that this rank scored or has from a shared scoring.
            ranks: all of them.
            device: of this rank, where its sums are made.

        Returns:
            Of each slide that was scored again, which share of its winners are others than before.
        """
        fresh = sorted(set(step.slides) - step.served)
        changed = []
        if fresh:
            owners = {slide: rank for rank, hand in reversed(list(enumerate(step.hands))) for slide in hand}
            mine = [n for n, slide in enumerate(fresh) if owners[slide] == ranks.rank]  # one rank speaks for a slide
            rows = torch.zeros(len(fresh), self.rows.shape[1], dtype=torch.int64)
            for n in mine:
                rows[n] = found[fresh[n]] + 1
            rows = rows.to(device)
            ranks.sum_(rows)
            rows = rows.cpu() - 1
            changed = [_changed(old, new) for old, new in zip(self.rows[fresh], rows, strict=True) if old[0] >= 0]
            self.rows[fresh] = rows.int()
        self.turns.visit(step.slides)
        return tuple(changed)


def _changed(old: Tensor, new: Tensor) -> float:
    rows = set(new[new >= 0].tolist())
    return len(rows - set(old.tolist())) / len(rows)
