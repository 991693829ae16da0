"""What one decision does, and what a probability is worth: sensitivity and specificity, and calibration.

n slides; a slide counts once, so intervals are those of independent slides: of several slides a patient they are too
narrow, and the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

GROUPS = 10
THRESHOLD = "val_threshold_"
"""Before a task's name: metric of a training, and tag of a version, that keeps `choose_threshold` of its validation."""


@dataclass(frozen=True)
class Proportion:
    """A share of slides, with Wilson's 95% interval (1927), which knows n at the ends too."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """Hits / n; NaN for n = 0."""
        return self.hits / self.n if self.n else float("nan")

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper end; 0 to 1 for n = 0."""
        if not self.n:
            return 0.0, 1.0
        from scipy.stats import binomtest  # loads for a third of a second, and heatmaps need none of it

        found = binomtest(self.hits, self.n).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Decision:
    """Predicted positive from a threshold on, against what is true."""

    threshold: float
    sensitivity: Proportion
    """Of the positive slides, those that are predicted so."""
    specificity: Proportion
    """Of the negative slides, those that are predicted so."""
    positive_value: Proportion
    """Of those predicted positive, the positive ones; depends on how many there are in this cohort."""
    negative_value: Proportion


def decide(scores: Floats, positive: Bools, threshold: float = 0.5) -> Decision:
    """Scores (n,) of the positive class, truth (n,)."""
    called = scores >= threshold
    right, wrong = called == positive, called != positive
    return Decision(
        threshold,
        Proportion(int((right & positive).sum()), int(positive.sum())),
        Proportion(int((right & ~positive).sum()), int((~positive).sum())),
        Proportion(int((right & called).sum()), int(called.sum())),
        Proportion(int((right & ~called).sum()), int((right & ~called).sum() + (wrong & ~called).sum())),
    )


def choose_threshold(scores: Floats, positive: Bools) -> float | None:
    """The score (n,) from which to call positive: largest sensitivity + specificity (Youden 1950).

    Half-way between the two scores that it parts, the cut nearest to one half of equally good ones; None where one of
    the two kinds is absent. For slides that nothing else is reported on.
    """
    if not 0 < positive.sum() < len(positive):
        return None
    values = np.unique(scores)
    cuts = np.concatenate([[values[0]], (values[1:] + values[:-1]) / 2])
    gains = [float((scores[positive] >= cut).mean() + (scores[~positive] < cut).mean()) for cut in cuts]
    return float(min(zip(gains, cuts, strict=True), key=lambda one: (-round(one[0], 12), abs(one[1] - 0.5)))[1])


def thresholds(noted: Mapping[str, str | float]) -> dict[str, float]:
    """Binary task -> the score from which it is called positive, of a training's metrics or a version's tags."""
    return {key.removeprefix(THRESHOLD): float(value) for key, value in noted.items() if key.startswith(THRESHOLD)}


@dataclass(frozen=True)
class Reliability:
    """Slides in groups of like probability. Arrays of length g, empty groups left out."""

    predicted: Floats
    """Mean probability of the group."""
    share: Floats
    """Of the group, those that are positive."""
    low: Floats
    high: Floats
    """Ends of the share's interval."""
    counts: Ints
    brier: float
    """Mean squared distance of probability and truth, over all slides: 0 is best, 0.25 is a coin's."""
    error: float
    """Expected calibration error: mean distance of share and mean probability, by slides."""


def reliability(scores: Floats, positive: Bools) -> Reliability:
    """Scores (n,) in 0..1 of a class, truth (n,), n > 0, in `GROUPS` groups of equal width."""
    group = np.minimum((scores * GROUPS).astype(np.int64), GROUPS - 1)
    held = np.unique(group)
    counts = np.array([(group == one).sum() for one in held], np.int64)
    predicted = np.array([scores[group == one].mean() for one in held])
    shares = [Proportion(int(positive[group == one].sum()), int(n)) for one, n in zip(held, counts, strict=True)]
    share = np.array([one.value for one in shares])
    low, high = np.array([one.bounds for one in shares]).T
    brier = float(np.square(scores - positive).mean())
    error = float((counts * np.abs(share - predicted)).sum() / counts.sum())
    return Reliability(predicted, share, low, high, counts, brier, error)
