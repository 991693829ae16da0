"""Whether two groups of slides differ in something: permutation tests whose statistics are effects from 0 to 1.

| of | statistic |
|---|---|
| numbers | Kolmogorov and Smirnov's: the largest distance of the two distribution functions |
| words | total variation distance: half the sum of the differences of the shares |
| vectors | 1 - 2 k(a, b) / (k(a, a) + k(b, b)), k the mean of a Gaussian kernel of median width: squared MMD |

Each is 0 where nothing differs and 1 where nothing overlaps. Patients are dealt to the groups, not slides, which are
not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.inference.metrics import Bools, Floats

PERMUTATIONS = 4999  # so that p can be as small as .0002, and .004 after adjusting for twenty

Statistic = Callable[[Bools], Floats]
"""Memberships (R, n), True for the first group -> (R,)."""


def kolmogorov(values: Floats) -> Statistic:
    """Of values (n,): the largest distance of the two empirical distribution functions."""
    order = np.argsort(values, kind="stable")
    last = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)

    def statistic(new: Bools) -> Floats:
        inside = new[:, order]
        first, second = np.cumsum(inside, axis=1)[:, last], np.cumsum(~inside, axis=1)[:, last]
        found: Floats = np.abs(first / first[:, -1:] - second / second[:, -1:]).max(axis=1)
        return found

    return statistic


def total_variation(values: Sequence[str]) -> Statistic:
    """Of n words: half the sum of the differences of their shares."""
    names, which = np.unique(np.asarray(values, dtype=np.str_), return_inverse=True)
    held = np.eye(len(names))[which]

    def statistic(new: Bools) -> Floats:
        first, second = new @ held, ~new @ held
        shares = first / first.sum(axis=1, keepdims=True) - second / second.sum(axis=1, keepdims=True)
        found: Floats = np.abs(shares).sum(axis=1) / 2
        return found

    return statistic


def kernel_distance(vectors: Floats) -> Statistic:
    """Of vectors (n, D): the squared maximum mean discrepancy, as a share of what the sides are alike within."""
    squared = _far(vectors)
    apart = squared[~np.eye(len(vectors), dtype=np.bool_)]
    width = float(np.median(apart)) or 1.0
    kernel = np.exp(-squared / width)

    def statistic(new: Bools) -> Floats:
        first = new / new.sum(axis=1, keepdims=True)
        second = ~new / (~new).sum(axis=1, keepdims=True)
        towards = first @ kernel
        within = (towards * first).sum(axis=1) + ((second @ kernel) * second).sum(axis=1)
        found: Floats = np.maximum(1 - 2 * (towards * second).sum(axis=1) / within, 0.0)
        return found

    return statistic


def _far(vectors: Floats) -> Floats:
    """Squared distances (n, n) without a cube of differences."""
    norms = np.square(vectors).sum(axis=1)
    found: Floats = np.maximum(norms[:, None] + norms[None, :] - 2 * vectors @ vectors.T, 0.0)
    return found


def permutation_test(statistic: Statistic, new: Bools, patients: Sequence[str], seed: int) -> tuple[float, float]:
    """The statistic, and how often one as large comes of sides that patients were dealt to by chance.

    Args:
        statistic: of memberships.
        new: (n,) as it is.
        patients: n ids; the slides of one patient on one side stay together.
        seed: of what is dealt.
    """
    pairs = np.array([f"{patient}\0{side}" for patient, side in zip(patients, new.tolist(), strict=True)])
    _, first, unit = np.unique(pairs, return_index=True, return_inverse=True)
    sides = new[first]
    generator = np.random.default_rng(seed)
    dealt = generator.permuted(np.tile(sides, (PERMUTATIONS, 1)), axis=1)[:, unit]
    observed = float(statistic(new[None])[0])
    return observed, float((1 + (statistic(dealt) >= observed - 1e-12).sum()) / (1 + PERMUTATIONS))
