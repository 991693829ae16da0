"""How sharp the slides of a cohort are, and of its groups: a site or a scanner whose slides are duller shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.cohort.table import CohortSlide
from pipeline.results.strata import MOST

ALL = "all slides"


@dataclass(frozen=True)
class SharpGroup:
    """The slides of one group whose sharpness was measured."""

    column: str
    """Of the cohort; empty for all slides together."""
    value: str
    slides: int
    low: float
    """A tenth of the slides have a median below this."""
    median: float
    """Of the slides' medians."""
    high: float
    """A tenth of the slides have a median above this."""
    blurred: float
    """Share of the patches that were left out as blurred, of those that could be decoded."""


def sharp_groups(table: pa.Table, slides: Sequence[CohortSlide]) -> list[SharpGroup]:
    """All slides, then the groups of each column of the cohort's own that parts them into 2 to `strata.MOST`.

    Args:
        table: `quality_rows.as_columns_of_rows`, a row a slide.
        slides: of the cohort, in the same order; empty: no groups are told.

    Returns:
        Nothing where the sharpness of no slide was measured.
    """
    medians = table["sharpness"].to_numpy().astype(np.float64)
    kept = table["patches"].to_numpy()
    blurred = np.nan_to_num(table["rejected_blurred"].to_numpy().astype(np.float64))
    measured = np.isfinite(medians)

    def group(column: str, value: str, among: npt.NDArray[np.bool_]) -> SharpGroup:
        low, median, high = np.quantile(medians[among], [0.1, 0.5, 0.9]).tolist()
        lost = float(blurred[among].sum())
        share = lost / (lost + float(kept[among].sum()))
        return SharpGroup(column, value, int(among.sum()), low, median, high, share)

    if not measured.any():
        return []
    found = [group("", ALL, measured)]
    for column in dict.fromkeys(name for slide in slides for name in slide.extra):
        values = np.asarray([slide.extra.get(column, "") for slide in slides], dtype=np.str_)
        names = np.unique(values)
        for name in names if 2 <= len(names) <= MOST else ():
            among = measured & (values == name)
            if among.any():
                found.append(group(column, str(name) or "(empty)", among))
    return found
