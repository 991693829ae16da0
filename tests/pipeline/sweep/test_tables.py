"""Tables for people and programs."""

from __future__ import annotations

import pytest

from pipeline.sweep.tables import calibration_table, cells_table, pairs_table, predictions_table, strata_table
from tests.pipeline.sweep.made import made_cells, made_cohort, made_result, made_rows


def test_each_table_has_its_rows() -> None:
    rows = made_rows(
        made_cells(made_cohort(41), ["a", "b", "none"], memory=(3, 5))[:5], [0.2, 0.4, 0.6, 0.8, 0.3], failed=(1,)
    )
    result = made_result(rows)
    cells = cells_table([result]).to_pylist()
    assert len(cells) == 5
    assert [row["auc"] for row in cells] == sorted((row["auc"] for row in cells), reverse=True)
    assert {(row["model"], row["memory"]) for row in cells} == {("a", 3), ("a", 5), ("b", 3), ("b", 5), ("none", 3)}
    assert all(row["auc_low"] <= row["auc"] <= row["auc_high"] and row["seconds_a_slide"] == 0.25 for row in cells)
    pairs = pairs_table([result]).to_pylist()
    assert len(pairs) == 10
    assert all(row["p_holm"] >= row["p"] and row["delong_p"] is not None for row in pairs)
    assert len(strata_table([result])) == 5 * 3
    calibration = calibration_table([result]).to_pylist()
    for cell in {row["cell"] for row in calibration}:
        assert sum(row["slides"] for row in calibration if row["cell"] == cell) == 40
    predictions = predictions_table(rows).to_pylist()
    assert len(predictions) == 5 * 41
    (failed,) = [row for row in predictions if row["reason"] is not None]
    assert (failed["slide_id"], failed["tumour_yes"]) == ("s1", None)
    assert predictions[0]["tumour_no"] + predictions[0]["tumour_yes"] == pytest.approx(1)


def test_a_cell_without_predictions_is_a_row_too() -> None:
    rows = made_rows(made_cells(made_cohort(9), ["none", "a"]), [0.2, 0.4], failed=tuple(range(9)))
    cells = {row["model"]: row for row in cells_table([made_result(rows)]).to_pylist()}
    assert (cells["none"]["slides"], cells["none"]["failures"], cells["none"]["auc"]) == (0, 9, None)
