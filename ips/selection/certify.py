"""How far a low-precision selection can be trusted: the doubtful patches are scored again in float32.

The largest error of a log score is measured on a sample. A patch further than twice that from the M-th score cannot
change sides unless its own error is larger than any seen, so only the band within is scored again. Winners, scores and
attention are those of the logits as they are then. Measured, not proven.

Where heads take in turn (`in_turns`), errors are those of logits, each head's own, and any patch may be in doubt that a
head's last wish does not leave twice that behind; what it took before as well, since who takes first decides what is
left for others. The last wish has a float32 logit at the end, so once its error would do: the other is a margin.
These are scored again until none is new: at the end all that is taken has float32 logits, and so has all that could be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ips.bag import Bag, Certificate
from ips.selection.pools import LogitCache
from ips.selection.ranking import in_turns, log_normalisers, log_scores
from ips.selection.scorer import Scorer
from ips.selection.stream import score_rows

SAMPLE = 256
"""Patches the error is measured on, evenly spread over the rows."""


def certified(
    cache: LogitCache, bags: Sequence[Bag], number: int, memory: int, chunk: int, reference: Scorer
) -> Certificate:
    """Put the float32 logits of one image's doubtful patches into its cache, which then says who wins.

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
    first, _ = cache.winners(memory)
    sample = torch.linspace(0, len(keys) - 1, min(SAMPLE, len(keys)), dtype=torch.float64).round().long()
    (found,) = score_rows(reference, bags, [(number, sample)], chunk)

    def again(rows: Tensor) -> int:
        cache.add(rows, *score_rows(reference, bags, [(number, rows)], chunk))
        return len(rows)

    if cache.rank == "heads":
        errors = (found - cache.logits[sample]).abs().amax(dim=0)
        error = float(errors.max())
        cache.add(sample, found)
        count = _settled(cache, memory, errors, again)
    else:
        error = float((log_scores(found, log_z) - keys[sample]).abs().max())
        cache.add(sample, found)
        count = again(((keys - keys[first[-1]]).abs() <= 2 * error).nonzero().squeeze(1))
    second, _ = cache.winners(memory)
    return Certificate(error, count, int((~torch.isin(second, first)).sum()))


def _settled(cache: LogitCache, memory: int, errors: Tensor, again: Callable[[Tensor], int]) -> int:
    """Score again whatever may be taken, by errors (J,) of the logits, until all of it is; how many patches."""
    N, J = cache.logits.shape
    done = torch.zeros(N, dtype=torch.bool)
    while True:
        turns = in_turns(cache.logits, torch.arange(N), memory)
        wishes = torch.arange(min(J, len(turns)))  # with fewer turns than heads the others take none
        last = len(turns) - 1 - (len(turns) - 1 - wishes) % J
        least = cache.logits[turns[last], wishes]
        doubted = (cache.logits[:, wishes] >= least - 2 * errors[wishes]).any(dim=1) & ~done
        if not doubted.any():
            return int(done.sum())
        again(doubted.nonzero().squeeze(1))
        done |= doubted
