"""One seeded plan of resamples of a cohort's patients, and what it says of two models that were tested on them.

All models of a cohort are measured on the same resamples, so a slide that is hard for all of them does not blur their
difference. Patients are drawn, within the classes of the first task, since their slides are not independent and the
number of each class is known; so every class that a patient has alone of his is in every resample. The plan is kept,
with the counts that were drawn: another NumPy may draw others from the same seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import StageError
from pipeline.inference.metrics import Bools, Floats

Counts = npt.NDArray[np.uint8]

ALPHA = 0.05
_META = b"ips.resampling"


@dataclass(frozen=True)
class ResamplingPlan:
    """B resamples of P patients, stratified."""

    seed: int
    patients: tuple[str, ...]
    """P ids, sorted."""
    strata: tuple[int, ...]
    """Of each patient."""
    counts: Counts
    """(B, P) how often a resample holds a patient; 256 times is beyond any chance."""

    def weights(self, patients: Sequence[str]) -> Counts:
        """(B, n) how often each resample holds each of n slides, by their patients.

        Raises:
            StageError: a patient is not of the plan.
        """
        places = {patient: place for place, patient in enumerate(self.patients)}
        if strangers := sorted(set(patients) - places.keys()):
            raise StageError(
                f"resampling: {len(strangers)} patients are not of the plan, such as {strangers[0]!r}: it was drawn of "
                "another cohort; draw one of this"
            )
        return self.counts[:, [places[patient] for patient in patients]]

    @property
    def digest(self) -> str:
        """sha256 (hex) of all of it."""
        head = json.dumps([self.seed, self.patients, self.strata, self.counts.shape]).encode()
        return hashlib.sha256(head + np.ascontiguousarray(self.counts).tobytes()).hexdigest()

    def table(self) -> pa.Table:
        """As it is kept: a row a patient, `counts` a byte a resample."""
        columns = {
            "patient_id": pa.array(self.patients, pa.string()),
            "stratum": pa.array(self.strata, pa.int64()),
            "counts": pa.array([column.tobytes() for column in self.counts.T], pa.binary(len(self.counts))),
        }
        return pa.table(columns).replace_schema_metadata({_META: json.dumps({"seed": self.seed}).encode()})


def draw_plan(patients: Sequence[str], strata: Sequence[int], resamples: int, seed: int) -> ResamplingPlan:
    """Draw patients with replacement, as many of each stratum as it has; the order of the slides does not matter.

    Args:
        patients: of n slides.
        strata: of these slides (`labels.stratum`); a patient's is the highest of his.
        resamples: B.
        seed: of what is drawn.
    """
    stratum_of: dict[str, int] = {}
    for patient, stratum in zip(patients, strata, strict=True):
        stratum_of[patient] = max(stratum, stratum_of.get(patient, stratum))
    names = sorted(stratum_of)
    held = np.array([stratum_of[name] for name in names], np.int64)
    counts, generator = np.zeros((resamples, len(names)), np.uint8), np.random.default_rng(seed)
    for stratum in np.unique(held):
        members = np.flatnonzero(held == stratum)
        counts[:, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    return ResamplingPlan(seed, tuple(names), tuple(held.tolist()), counts)


def read_plan(table: pa.Table) -> ResamplingPlan:
    """The plan of `ResamplingPlan.table`."""
    seed = json.loads(table.schema.metadata[_META])["seed"]
    rows = [np.frombuffer(row, np.uint8) for row in table["counts"].to_pylist()]
    counts = np.stack(rows, axis=1)
    return ResamplingPlan(seed, tuple(table["patient_id"].to_pylist()), tuple(table["stratum"].to_pylist()), counts)


@dataclass(frozen=True)
class Difference:
    """A measure of one model minus that of another, with the bounds of its interval and a two-sided p."""

    value: float
    low: float
    high: float
    p: float


def paired_difference(
    values: tuple[float, float],
    resampled: tuple[Floats, Floats],
    *,
    least: float | None = None,
    alpha: float = ALPHA,
) -> Difference:
    """First minus second, both measured on the resamples of one plan.

    The interval is that of percentiles, p the share of resamples on the other side of 0, twice, which excludes 0 where
    the interval does. Resamples that lack what a measure needs (NaN) are left out.

    Args:
        values: of all slides, of either model.
        resampled: (B,) of either.
        least: `intervals.floor`: where no resample differs, as between two perfect models, the number of patients does
            not exclude a difference of 1 - least.
        alpha: 1 - alpha is the interval's coverage.

    Raises:
        StageError: hardly any resample has what the measure needs.
    """
    found = resampled[0] - resampled[1]
    found = found[~np.isnan(found)]
    if 2 * len(found) < len(resampled[0]):
        raise StageError(
            f"resampling: only {len(found)} of {len(resampled[0])} resamples hold what the measure needs; label more "
            "patients of the rare classes"
        )
    value = values[0] - values[1]
    low, high = (float(end) for end in np.quantile(found, (alpha / 2, 1 - alpha / 2)))
    below, above = (1 + int((found <= 0).sum())) / (1 + len(found)), (1 + int((found >= 0).sum())) / (1 + len(found))
    if least is not None and found.min() == found.max():
        low, high = min(low, value - (1 - least)), max(high, value + (1 - least))
        return Difference(value, low, high, 1.0)
    return Difference(value, low, high, min(1.0, 2 * min(below, above)))


def delong(scores: tuple[Floats, Floats], positive: Bools, patients: Sequence[str], alpha: float = ALPHA) -> Difference:
    """The difference of two AUC by DeLong et al. (1988), clustered by patient as Obuchowski (1997): normal theory.

    Args:
        scores: (n,) of either model.
        positive: (n,) both kinds must be there.
        patients: n ids.
        alpha: as of `paired_difference`.
    """
    from scipy.stats import norm

    (first, first_placed), (second, second_placed) = (_placements(each, positive) for each in scores)
    value = first - second
    error = float(np.sqrt(_variance(first_placed - second_placed, value, positive, patients)))
    if error == 0:
        return Difference(value, value, value, 1.0 if value == 0 else 0.0)
    reach = float(norm.ppf(1 - alpha / 2)) * error
    return Difference(value, value - reach, value + reach, float(2 * norm.sf(abs(value) / error)))


def _placements(scores: Floats, positive: Bools) -> tuple[float, Floats]:
    """AUC, and each slide's share of the other kind that it stands in order with (n,); ties count half."""
    from scipy.stats import rankdata

    placed, held, others = np.empty(len(scores)), int(positive.sum()), int((~positive).sum())
    overall = rankdata(scores)
    placed[positive] = (overall[positive] - rankdata(scores[positive])) / others
    placed[~positive] = 1 - (overall[~positive] - rankdata(scores[~positive])) / held
    return float(placed[positive].mean()), placed


def _variance(placed: Floats, area: float, positive: Bools, patients: Sequence[str]) -> float:
    """Of the mean of placements, whose patients are independent; of one slide a patient it is DeLong's."""
    _, owner = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)
    count = int(owner.max()) + 1
    total = [np.bincount(owner[kind], placed[kind] - area, count) for kind in (positive, ~positive)]
    held = [np.bincount(owner[kind], minlength=count) > 0 for kind in (positive, ~positive)]
    slides = [int(positive.sum()), int((~positive).sum())]
    own = [
        float(np.square(sums).sum()) * _unbiased(int(some.sum())) / n**2
        for sums, some, n in zip(total, held, slides, strict=True)
    ]
    both = float((total[0] * total[1]).sum()) * _unbiased(count) / (slides[0] * slides[1])
    return max(0.0, sum(own) + 2 * both)


def _unbiased(clusters: int) -> float:
    return clusters / (clusters - 1) if clusters > 1 else 1.0


def holm(ps: Sequence[float]) -> list[float]:
    """P values adjusted for being looked at together (Holm 1979), in the order given."""
    order = np.argsort(ps, kind="stable")
    scaled = np.asarray(ps, np.float64)[order] * np.arange(len(ps), 0, -1)
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()
