"""Chunks of any size from several bags, scored through one encoder batch size.

    chunks -> (duplicates folded) -> queue of patches -> encoder, `batch` at a time -> logits, in the chunks' order

Device memory: one chunk of pixels, one encoder batch, and the logits of the chunks still waiting; their embeddings too,
where they are watched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ips.bag import Bag, Chunk
from ips.selection.intake import check_logits, checked, take_rows
from ips.selection.scorer import Scorer, pad_rows
from ips.selection.transfer import to_device
from ips.selection.unique import distinct_rows, unique_rows

Watch = Callable[[int, Tensor, Tensor, Tensor], None]
"""Is told of chunks as they leave: bag number, index (n,), logits (n, J), and (n, D) embeddings with positions."""


@dataclass
class _Item:
    """One chunk on its way: `table` (U, J) holds the logits of its distinct patches, `missing` of them still open.

    Where embeddings are watched, it is (U, J + D).
    """

    bag: int
    index: Tensor
    places: Tensor | None
    table: Tensor
    inverse: Tensor
    missing: int
    colours: dict[tuple[int, ...], int] = field(default_factory=dict)
    """Constant patches met for the first time: bytes of the colour -> row of the table."""


@dataclass
class _Queued:
    """Patches (k, ...) whose logits belong into `rows` (k,) of the item's table."""

    item: _Item
    rows: Tensor
    patches: Tensor


class Stream:
    """Scores chunks; one use, one pass."""

    def __init__(self, scorer: Scorer, watch: Watch | None = None) -> None:
        self._scorer, self._watch = scorer, watch
        self._columns = scorer.width + (0 if watch is None else scorer.model.pooling.dim)
        self._queue: deque[_Queued] = deque()
        self._queued = 0
        self._colours: dict[tuple[int, ...], Tensor] = {}
        self.encoded = 0
        """Patches the encoder has seen, without padding."""

    @torch.no_grad()
    def run(self, source: Iterable[tuple[int, Chunk]]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(bag number, chunk) pairs -> (bag number, index (n,), logits (n, J)), on the host, in order."""
        waiting: deque[_Item] = deque()
        leaving: deque[_Leaving] = deque()
        for bag, chunk in source:
            waiting.append(self._admit(bag, chunk))
            while self._queued >= self._scorer.batch:
                self._encode(self._scorer.batch)
            while waiting and not waiting[0].missing:
                leaving.append(self._finish(waiting.popleft()))
            while len(leaving) > 1:  # one stays behind, so that the copy to the host overlaps with the next batch
                yield leaving.popleft().arrive()
        if self._queued:
            self._encode(self._queued)
        leaving.extend(self._finish(item) for item in waiting)
        for left in leaving:
            yield left.arrive()

    def _admit(self, bag: int, chunk: Chunk) -> _Item:
        scorer = self._scorer
        patches = scorer.receive(chunk)
        n = len(patches)
        rows = inverse = torch.arange(n, device=patches.device)
        flat = 0
        if scorer.dedupe:
            rows, inverse, flat = distinct_rows(patches) if patches.ndim == 4 else (*unique_rows(patches), 0)
        table = torch.empty(len(rows), self._columns, dtype=scorer.logit_dtype, device=scorer.device)
        places = scorer.model.places(chunk.index, chunk.positions)
        if places is not None:
            places = _kept(to_device(places, scorer.device, side_stream=scorer.side_stream), places)
        item = _Item(bag, chunk.index.clone(), places, table, inverse, 0)
        open_rows = torch.arange(len(rows), device=patches.device)
        if flat:
            open_rows = self._recall(item, patches, rows, flat)
        item.missing = len(open_rows)
        if item.missing:
            whole = item.missing == n and not flat
            left = _kept(patches, chunk.patches) if whole else patches[rows[open_rows]]
            self._queue.append(_Queued(item, open_rows, left))
            self._queued += item.missing
        return item

    def _recall(self, item: _Item, patches: Tensor, rows: Tensor, flat: int) -> Tensor:
        """Fill in those of the last `flat` rows, of one colour each, that this pass has met; return the rows open."""
        plain = len(rows) - flat
        still_open = list(range(plain))
        colours = patches[:, :, 0, 0][rows[plain:]].contiguous().view(torch.uint8).tolist()  # -0.0 is not 0.0
        for row, colour in enumerate(map(tuple, colours), start=plain):
            known = self._colours.get(colour)
            if known is None:
                item.colours[colour] = row
                still_open.append(row)
            else:
                item.table[row] = known
        return torch.tensor(still_open, dtype=torch.int64, device=patches.device)

    def _encode(self, count: int) -> None:
        """Encode the first `count` queued patches as one padded batch and hand out their logits."""
        taken: list[_Queued] = []
        left = count
        while left:
            first = self._queue.popleft()
            if len(first.rows) > left:
                self._queue.appendleft(_Queued(first.item, first.rows[left:], first.patches[left:]))
                first = _Queued(first.item, first.rows[:left], first.patches[:left])
            taken.append(first)
            left -= len(first.rows)
        patches = torch.cat([part.patches for part in taken]) if len(taken) > 1 else taken[0].patches
        logits, embeddings = self._scorer.content(pad_rows(patches, self._scorer.batch))
        found = logits if self._watch is None else torch.cat((logits, embeddings), dim=1)
        start = 0
        for part in taken:
            stop = start + len(part.rows)
            part.item.table[part.rows] = found[start:stop]
            part.item.missing -= len(part.rows)
            start = stop
        self._queued -= count
        self.encoded += count

    def _finish(self, item: _Item) -> _Leaving:
        for colour, row in item.colours.items():
            self._colours[colour] = item.table[row].clone()
        logits, x = item.table[item.inverse].tensor_split([self._scorer.width], dim=1)
        if item.places is not None:
            logits = logits + self._scorer.place_logits(item.places)
        if self._watch is not None:
            position = self._scorer.model.position
            x = x if position is None or item.places is None else x + position(item.places)
            self._watch(item.bag, item.index, logits, x)
        return _Leaving(item.bag, item.index, logits)


def score_rows(
    scorer: Scorer, bags: Sequence[Bag], wanted: Sequence[tuple[int, Tensor]], size: int, watch: Watch | None = None
) -> list[Tensor]:
    """Logits (n, J) of each (bag number, rows (n,)), taken `size` at a time; batches are filled over all of them."""

    def chunks() -> Iterator[tuple[int, Chunk]]:
        for number, rows in wanted:
            for part in torch.split(rows, size) if len(rows) else ():
                yield number, take_rows(bags[number], number, part)

    found = []
    with scorer.evaluating():
        passed = checked(scorer.model, chunks(), [len(bag) for bag in bags])
        for number, index, logits in Stream(scorer, watch).run(passed):
            check_logits(number, index, logits)
            found.append(logits)
    every = torch.cat([torch.empty(0, scorer.width, dtype=scorer.logit_dtype), *found])
    return list(torch.split(every, [len(rows) for _, rows in wanted]))


def _kept(x: Tensor, given: Tensor) -> Tensor:
    """A copy of x where it is the very memory `given` by a bag, which may fill it anew for the next chunk."""
    same = x.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return x.clone() if same else x


class _Leaving:
    """Logits on their way to the host: the copy runs while the device goes on."""

    def __init__(self, bag: int, index: Tensor, logits: Tensor) -> None:
        self._bag, self._index, self._logits = bag, index, logits
        self._event: torch.cuda.Event | None = None
        if logits.is_cuda:
            self._logits = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
            self._logits.copy_(logits, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(logits.device))  # not that of the current device

    def arrive(self) -> tuple[int, Tensor, Tensor]:
        if self._event is not None:
            self._event.synchronize()
        return self._bag, self._index, self._logits
