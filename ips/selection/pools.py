"""What collects an image's logits during the selection, and names the winners at the end: on the host.

And what collects embeddings: their sums, on the device, and on the host each patch's values, where asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ips.network.context import empty, merged, summed
from ips.network.model import IPSModel
from ips.selection.ranking import Rank, log_normalisers, log_scores, winners

Draw = Callable[[Tensor, int], Tensor | tuple[Tensor, Tensor]]
"""Log scores of all patches (N,) and M -> the rows (m <= M,) that win, instead of the best; and weights (m,) of their
gradients, where they are not all 1 (of `select` with `context="rest"`)."""


class Pool(Protocol):
    """Takes an image's logits in the order they come."""

    def add(self, index: Tensor, logits: Tensor) -> None:
        """Logits (n, J) of rows (n,)."""
        ...

    def winners(self, memory: int) -> tuple[Tensor, Tensor]:
        """Rows (<= M,) and their log scores, best first."""
        ...

    def of(self, rows: Tensor) -> Tensor:
        """Logits (m, J) that winners (m,) came with."""
        ...

    @property
    def scored(self) -> int:
        """Patches that the softmax of those scores runs over."""
        ...


class LogitCache:
    """All logits of one image, (N, J) on the host."""

    def __init__(self, N: int, J: int, dtype: torch.dtype = torch.float32, rank: Rank = "mean") -> None:
        self.logits, self.rank = torch.empty(N, J, dtype=dtype), rank

    def add(self, index: Tensor, logits: Tensor) -> None:
        """Keep logits (n, J) of rows (n,)."""
        self.logits[index] = logits

    def log_scores(self) -> Tensor:
        """(N,) float64 over the whole image."""
        return log_scores(self.logits, log_normalisers(self.logits))

    def attention(self, tasks: int | None = None) -> Tensor:
        """The softmax over the whole image: (N,) float32, the mean over heads and tasks, or of each, (N, H, T)."""
        if tasks is None:
            return self.log_scores().exp().float()
        each = (self.logits.double() - log_normalisers(self.logits)).exp().float()
        return each.view(len(each), -1, tasks)

    def winners(self, memory: int) -> tuple[Tensor, Tensor]:
        """Rows and log scores of the best."""
        return winners(self.logits, torch.arange(len(self.logits)), memory, self.rank)

    def of(self, rows: Tensor) -> Tensor:
        """Logits of rows (m,)."""
        return self.logits[rows]

    @property
    def scored(self) -> int:
        """All N."""
        return len(self.logits)


class Window:
    """The official loop: first M rows, then I at a time; the best M of each pool of M + I stay.

    Those that heads take in turn are the same for any order and chunk.
    """

    def __init__(
        self, memory: int, chunk: int, J: int, dtype: torch.dtype = torch.float32, rank: Rank = "mean"
    ) -> None:
        self._memory, self._step, self._rank = memory, chunk, rank
        self._index, self._logits = torch.empty(0, dtype=torch.int64), torch.empty(0, J, dtype=dtype)

    def add(self, index: Tensor, logits: Tensor) -> None:
        """Rank every pool that is full and not the last."""
        self._index = torch.cat((self._index, index))
        self._logits = torch.cat((self._logits, logits))
        full = self._memory + self._step
        while len(self._index) > full:  # the last pool, full or not, is ranked by `winners`
            keep, _ = winners(self._logits[:full], self._index[:full], self._memory, self._rank)
            self._index = torch.cat((self._index[keep], self._index[full:]))
            self._logits = torch.cat((self._logits[keep], self._logits[full:]))

    def winners(self, memory: int) -> tuple[Tensor, Tensor]:
        """Rows and log scores of the best of the last pool."""
        keep, keys = winners(self._logits, self._index, memory, self._rank)
        return self._index[keep], keys

    def of(self, rows: Tensor) -> Tensor:
        """Logits of rows (m,) of the last pool."""
        return self._logits[(self._index == rows.unsqueeze(1)).int().argmax(dim=1)]

    @property
    def scored(self) -> int:
        """Those of the last pool."""
        return len(self._index)


class Sums:
    """The context of each image's patches, so far; a `Watch` of a stream."""

    def __init__(self, model: IPSModel, images: int, *, learn: bool) -> None:
        attention = model.pooling.attention
        self.learn = learn
        self._projection = attention.projection().detach() if learn else None
        J, D_v = attention.heads * attention.tasks, attention.value_dim if learn else None
        self.images = [empty(J, model.pooling.dim, D_v, model.mean.device) for _ in range(images)]

    def __call__(self, number: int, _index: Tensor, logits: Tensor, x: Tensor) -> None:
        """Add patches of one image."""
        self.images[number] = merged(self.images[number], summed(logits, x, self._projection))


class ValueCache:
    """The values of all patches of each image, on the host; a `Watch` of a stream."""

    def __init__(self, model: IPSModel, sizes: Sequence[int]) -> None:
        self._projection = model.pooling.attention.projection().detach()
        H, D_v, _ = self._projection.shape
        self.images = [torch.empty(N, H, D_v, dtype=model.mean.dtype) for N in sizes]

    def __call__(self, number: int, index: Tensor, _logits: Tensor, x: Tensor) -> None:
        """Keep those of rows (n,)."""
        with torch.autocast(x.device.type, enabled=False):
            self.images[number][index] = torch.einsum("nd,hvd->nhv", x, self._projection).cpu()


def won(
    pools: Sequence[Pool], memory: int, draw: Draw | Sequence[Draw] | None, *, weighted: bool
) -> list[tuple[Tensor, ...]]:
    """Of each image the rows of the winners, their log scores, and what the draw weighs them by, if it does.

    Args:
        pools: of the images.
        memory: M.
        draw: who wins instead of the best, of all images or of each.
        weighted: whether a draw may weigh them.

    Raises:
        ValueError: what is drawn is not M different rows at most, or their weights are not finite or not asked for.
    """
    if draw is None:
        return [pool.winners(memory) for pool in pools]
    draws = draw if isinstance(draw, Sequence) else [draw] * len(pools)
    return [_drawn(pool, memory, one, weighted) for pool, one in zip(pools, draws, strict=True)]


def _drawn(pool: Pool, memory: int, draw: Draw, weighted: bool) -> tuple[Tensor, ...]:  # noqa: FBT001
    assert isinstance(pool, LogitCache)
    keys = pool.log_scores()
    drawn = draw(keys, memory)
    rows, *weights = drawn if isinstance(drawn, tuple) else (drawn,)
    if len(rows) > memory or len(torch.unique(rows)) < len(rows) or ((rows < 0) | (rows >= len(keys))).any():
        raise ValueError(
            f"draw gave {rows.tolist()[:9]} ...: it must give at most {memory} different rows of {len(keys)}"
        )
    for own in weights:
        if own.shape != rows.shape or not own.isfinite().all():
            raise ValueError(f"draw gave weights {own.tolist()[:9]} ...: it must give a finite one for each row")
        if not weighted:
            raise ValueError("draw weighs gradients, to stand for those of all patches: they need context='rest'")
    return rows, keys[rows], *weights
