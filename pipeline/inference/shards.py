"""A large bag scored in strips, by several processes; whoever has the logits of all of them selects as one alone would.

A logit depends on its patch alone (`ips.selection.scorer`), so the winners, and what is predicted of them, are those of
one process to the last bit. As `ips.selection.shards`, without a process group: strips may come from anywhere, in any
order, and again where a process was lost.

What all patches put into the pool is summed over chunks, one after another. Strips that begin where a chunk does keep
each chunk's own sum, and these are added in the order of one process: so that is the same to the last bit too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ips.bag import Bag, Chunk, Context, Selection, Values
from ips.network.context import empty, merged, summed
from ips.network.model import IPSModel
from ips.selection.intake import check_logits, checked
from ips.selection.pools import LogitCache, ValueCache
from ips.selection.ranking import Rank
from ips.selection.scorer import Scorer
from ips.selection.select import assemble
from ips.selection.shards import strip
from ips.selection.stream import Stream, Watch

Item = TypeVar("Item")
Part = TypeVar("Part")


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


@dataclass(frozen=True)
class Cut(Generic[Part]):
    """What an actor gives of an item that others should help with."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Joined(Generic[Item]):
    """An item all of whose parts are there."""

    item: Item
    found: tuple[Any, ...]
    """What came of each part, in their order."""


@dataclass(frozen=True)
class Scores:
    """What is known of the patches of a bag, or of a strip of it, once all are scored; on the host. Picklable."""

    logits: Tensor
    """(n, J)."""
    sums: tuple[Context, ...] = ()
    """Of each chunk in turn, where the model pools all patches (`select.context: all`)."""
    values: Tensor | None = None
    """(n, H, D_v), likewise: what each put into the pool (`ips.bag.Values`)."""


def borders(rows: int, parts: int, step: int = 1) -> list[tuple[int, int]]:
    """Where each of equal strips begins and ends, at a multiple of `step`; as many as there are steps, at most."""
    steps = -(-rows // step)
    parts = min(steps, parts)
    ends = [min(rows, steps * part // parts * step) for part in range(parts + 1)]
    return list(pairwise(ends))


def strip_logits(own: Bag, rows: int, scorer: Scorer, size: int, watch: Watch | None = None) -> Tensor:
    """Logits (n, J) of a strip's rows, in order, on the host.

    Args:
        own: a `Strip`, or what shares its reading with others.
        rows: of the whole bag.
        scorer: of the model.
        size: patches read at a time.
        watch: is told of each chunk.

    Raises:
        ValueError: patches that the model cannot take; what the bag raises passes through.
    """
    scorer.follow()
    found = [torch.empty(0, scorer.width, dtype=scorer.logit_dtype)]
    with scorer.evaluating():
        chunks = checked(scorer.model, ((0, chunk) for chunk in own.chunks(size)), [rows])
        for number, index, logits in Stream(scorer, watch).run(chunks):
            check_logits(number, index, logits)
            found.append(logits)
    return torch.cat(found)


def strip_scores(own: Strip, scorer: Scorer, size: int, *, context: bool) -> Scores:
    """The scores of a strip; `context`: also of all its patches what they put into the pool.

    Args and errors as `strip_logits`; with `context` the strip begins at a multiple of `size`.
    """
    rows = len(own.bag)
    if not context:
        return Scores(strip_logits(own, rows, scorer, size))
    sums: list[Context] = []
    values = ValueCache(scorer.model, [len(own)])

    def watch(number: int, index: Tensor, logits: Tensor, x: Tensor) -> None:
        sums.append(_moved(summed(logits, x), torch.device("cpu")))
        values(number, index - own.start, logits, x)

    logits = strip_logits(own, rows, scorer, size, watch)
    return Scores(logits, tuple(sums), values.images[0])


def joined_scores(parts: Sequence[Scores]) -> Scores:
    """Of a whole bag, of those of all its strips in their order."""
    values = [part.values for part in parts if part.values is not None]
    return Scores(
        torch.cat([part.logits for part in parts]),
        tuple(one for part in parts for one in part.sums),
        torch.cat(values) if values else None,
    )


def selected(scores: Scores, memory: int, model: IPSModel, *, heads: bool = False, rank: Rank = "mean") -> Selection:
    """The best of all patches of a bag, with the attention of each; as `ips.selection.select.select`, mode exact.

    Args:
        scores: of all N patches.
        memory: M.
        model: that scored them.
        heads: give the attention of each head and task.
        rank: which patches are the best, as in `select`.
    """
    N, J = scores.logits.shape
    cache = LogitCache(N, J, scores.logits.dtype, rank)
    cache.add(torch.arange(N), scores.logits)
    maps = (cache.attention(len(model.tasks) if heads else None),)
    found = assemble([cache.winners(memory)], memory, [cache.scored], maps)
    if scores.values is None:
        return found
    device = model.mean.device  # whose float64 it is that one process adds up in
    nothing = empty(J, model.pooling.dim, None, device)
    whole = reduce(merged, (_moved(one, device) for one in scores.sums), nothing)
    return replace(found, whole=whole, values=(Values(cache.logits, scores.values),))


def _moved(context: Context, device: torch.device) -> Context:
    return Context(context.log_mass.to(device), context.mean.to(device))
