"""A large bag scored in strips, by several processes; whoever has the logits of all of them selects as one alone would.

A logit depends on its patch alone (`ips.selection.scorer`), so the winners, and what is predicted of them, are those of
one process to the last bit. As `ips.selection.shards`, without a process group: strips may come from anywhere, in any
order, and again where a process was lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ips.bag import Bag, Chunk, Selection
from ips.selection.intake import check_logits, checked
from ips.selection.pools import LogitCache
from ips.selection.scorer import Scorer
from ips.selection.select import assemble
from ips.selection.shards import strip
from ips.selection.stream import Stream


@dataclass(frozen=True)
class Strip:
    """Rows `start` to `stop` of a bag, as a bag that gives these alone, under their numbers in the whole one."""

    bag: Bag
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def chunks(self, size: int) -> Iterator[Chunk]:
        """These rows, in order, at most `size` at a time."""
        return strip(self.bag, size, self.start, self.stop)

    def take(self, rows: Tensor) -> Chunk:
        """As the whole bag's."""
        return self.bag.take(rows)


def borders(rows: int, parts: int) -> list[tuple[int, int]]:
    """Where each of equal strips begins and ends; as many as there are rows, at most."""
    parts = min(rows, parts)
    return [(rows * part // parts, rows * (part + 1) // parts) for part in range(parts)]


def strip_logits(own: Bag, rows: int, scorer: Scorer, size: int) -> Tensor:
    """Logits (n, J) of a strip's rows, in order, on the host.

    Args:
        own: a `Strip`, or what shares its reading with others.
        rows: of the whole bag.
        scorer: of the model.
        size: patches read at a time.

    Raises:
        ValueError: patches that the model cannot take; what the bag raises passes through.
    """
    scorer.follow()
    found = [torch.empty(0, scorer.width, dtype=scorer.logit_dtype)]
    with scorer.evaluating():
        chunks = checked(scorer.model, ((0, chunk) for chunk in own.chunks(size)), [rows])
        for number, index, logits in Stream(scorer).run(chunks):
            check_logits(number, index, logits)
            found.append(logits)
    return torch.cat(found)


def selected(logits: Tensor, memory: int) -> Selection:
    """The best of all patches of a bag, of their logits (N, J), with the attention of each; as mode exact."""
    N, J = logits.shape
    cache = LogitCache(N, J, logits.dtype)
    cache.add(torch.arange(len(logits)), logits)
    return assemble([cache.winners(memory)], memory, [cache.scored], (cache.attention(),))
