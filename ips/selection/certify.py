"""How far a low-precision selection can be trusted: the doubtful patches are scored again in float32.

The largest error of a log score is measured on a sample. A patch further than twice that from the M-th score cannot
change sides unless its own error is larger than any seen, so only the band within is scored again. The normalisers
stay those of the first pass. Measured, not proven.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ips.bag import Bag, Certificate, Chunk
from ips.selection.intake import check_logits, checked, take_rows
from ips.selection.pools import LogitCache
from ips.selection.ranking import best, log_normalisers, log_scores
from ips.selection.scorer import Scorer
from ips.selection.stream import Stream

SAMPLE = 256
"""Patches the error is measured on, evenly spread over the rows."""


def certified(
    cache: LogitCache, bags: Sequence[Bag], number: int, memory: int, chunk: int, reference: Scorer
) -> tuple[tuple[Tensor, Tensor], Certificate]:
    """Winners of one image after the second scoring: ((rows, log scores), certificate).

    Args:
        cache: of the low-precision pass over the image; complete.
        bags: of all images.
        number: which of them the image is.
        memory: M.
        chunk: patches taken at a time.
        reference: a float32 scorer of the same weights.

    Raises:
        ValueError: the bag's `take` gives other rows than asked for, or patches or logits that `select` would refuse.
    """
    log_z = log_normalisers(cache.logits)
    keys = log_scores(cache.logits, log_z)
    index = torch.arange(len(keys))
    first = best(keys, index, memory)
    sample = torch.linspace(0, len(keys) - 1, min(SAMPLE, len(keys)), dtype=torch.float64).round().long()
    found = log_scores(_score(reference, bags, number, sample, chunk), log_z)
    error = float((found - keys[sample]).abs().max())
    band = ((keys - keys[first[-1]]).abs() <= 2 * error).nonzero().squeeze(1)
    keys[sample] = found
    keys[band] = log_scores(_score(reference, bags, number, band, chunk), log_z)
    second = best(keys, index, memory)
    changed = int((~torch.isin(second, first)).sum())
    return (second, keys[second]), Certificate(error, len(band), changed)


def _score(scorer: Scorer, bags: Sequence[Bag], number: int, rows: Tensor, size: int) -> Tensor:
    """Logits (n, J) of rows (n,) of one bag, taken `size` at a time."""

    def chunks() -> Iterator[tuple[int, Chunk]]:
        for part in rows.tensor_split(list(range(size, len(rows), size))):
            yield number, take_rows(bags[number], number, part)

    found = []
    with scorer.evaluating():
        for _, index, logits in Stream(scorer).run(checked(scorer.model, chunks(), [len(bag) for bag in bags])):
            check_logits(number, index, logits)
            found.append(logits)
    return torch.cat(found)
