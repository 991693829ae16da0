"""How far a low-precision selection can be trusted: the doubtful patches are scored again in float32.

The largest error of a log score is measured on a sample. A patch further than twice that from the M-th score cannot
change sides unless its own error is larger than any seen, so only the band within is scored again. Winners, scores and
attention are those of the logits as they are then. Measured, not proven.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ips.bag import Bag, Certificate
from ips.selection.pools import LogitCache
from ips.selection.ranking import best, log_normalisers, log_scores
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
    first = best(keys, torch.arange(len(keys)), memory)
    sample = torch.linspace(0, len(keys) - 1, min(SAMPLE, len(keys)), dtype=torch.float64).round().long()
    (found,) = score_rows(reference, bags, [(number, sample)], chunk)
    error = float((log_scores(found, log_z) - keys[sample]).abs().max())
    band = ((keys - keys[first[-1]]).abs() <= 2 * error).nonzero().squeeze(1)
    cache.add(sample, found)
    cache.add(band, *score_rows(reference, bags, [(number, band)], chunk))
    second, _ = cache.winners(memory)
    return Certificate(error, len(band), int((~torch.isin(second, first)).sum()))
