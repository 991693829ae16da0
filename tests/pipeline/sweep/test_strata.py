"""Groups of a cohort's columns, with too few to judge below a stated number."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.pipeline.sweep.made import made_cells, made_cohort, made_result, made_rows


def test_each_group_is_measured_alone_and_small_ones_are_not() -> None:
    rows = made_rows(made_cells(made_cohort(97), ["m"]), [0.5])
    found = {part.value: part for part in made_result(rows, few=5).strata}
    assert list(found) == ["a", "b", "c"]
    assert (found["c"].slides, found["c"].patients, found["c"].measures) == (3, 2, None)
    for site in "ab":
        inside = np.array([slide.extra["site"] == site for slide in rows[0].cell.cohort.slides])
        y = np.array([slide.labels["tumour"] == "yes" for slide in rows[0].cell.cohort.slides])
        measures = found[site].measures
        assert measures is not None
        assert measures["auc"] == pytest.approx(roc_auc_score(y[inside], rows[0].outputs[inside, 1]))
        assert found[site].slides == inside.sum()
    assert all(part.measures is None for part in made_result(rows, few=60).strata)
