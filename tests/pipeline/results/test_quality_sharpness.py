"""Which groups of a cohort are how sharp."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.cohort.table import CohortSlide
from pipeline.results.quality_sharpness import ALL, sharp_groups


def cohort(*sites: str, column: str = "site") -> list[CohortSlide]:
    return [CohortSlide(f"s{i}", "a", "p", None, None, {}, {column: site}) for i, site in enumerate(sites)]


def rows(medians: list[float | None], patches: list[int], blurred: list[int | None]) -> pa.Table:
    return pa.table({"sharpness": medians, "patches": patches, "rejected_blurred": blurred})


def test_groups_are_those_of_few_values() -> None:
    medians = [100.0, None, 300.0, 900.0, 500.0]
    table = rows(medians, [10, 0, 30, 20, 40], [0, None, 10, 5, 0])
    everything, north, south = sharp_groups(table, cohort("north", "north", "south", "south", "north"))
    assert (everything.column, everything.value, everything.slides) == ("", ALL, 4)
    low, median, high = np.quantile([100, 300, 900, 500], [0.1, 0.5, 0.9])
    assert (everything.low, everything.median, everything.high) == (low, median, high)
    assert everything.blurred == pytest.approx(15 / 115)
    assert (north.column, north.value, north.slides, north.median, north.blurred) == ("site", "north", 2, 300, 0)
    assert (south.value, south.slides, south.median, south.blurred) == ("south", 2, 600, 15 / 65)
    assert len(sharp_groups(table, cohort("a", "a", "a", "a", "a"))) == 1
    many = rows([1.0] * 13, [1] * 13, [0] * 13)
    assert len(sharp_groups(many, cohort(*"abcdefghijklm"))) == 1
    assert [group.value for group in sharp_groups(table, cohort("", "x", "", "y", ""))] == [ALL, "(empty)", "y"]


def test_of_what_was_not_measured_nothing_is_told() -> None:
    table = rows([None, None], [3, 4], [None, None]).cast(
        pa.schema([("sharpness", pa.float64()), ("patches", pa.int64()), ("rejected_blurred", pa.int32())])
    )
    assert sharp_groups(table, cohort("a", "b")) == []
