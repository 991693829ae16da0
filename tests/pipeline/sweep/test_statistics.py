"""What is said of cells, against scikit-learn and pair by pair."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.inference.resampling import holm
from pipeline.sweep.statistics import most_wrong
from tests.pipeline.sweep.made import made_cells, made_cohort, made_result, made_rows

N = 97


def test_rows_stand_in_the_order_of_the_cohort() -> None:
    (cell,) = made_cells(made_cohort(7), ["a"])
    (rows,) = made_rows([cell], [0.1], failed=(2,))
    assert rows.reasons == (None, None, "odd", None, None, None, None)
    assert rows.predicted.tolist() == [True, True, False, True, True, True, True]
    assert (rows.outputs[[0, 3, 6], 1] > 0.5).all()  # the positive ones, nearly without noise
    assert rows.costs == pytest.approx(
        {
            "seconds_a_slide": 0.25,
            "read_seconds_a_slide": 0.5,
            "patches_a_second": 20 / 0.75,
            "patches_a_slide": 20,
            "peak_gib": 0,
        }
    )


def test_a_slide_without_a_row_is_missing() -> None:
    cohort = made_cohort(7)
    (cell,) = made_cells(cohort, ["a"])
    (rows,) = made_rows([cell], [0.1])
    more = made_cells(made_cohort(9), ["a"])[0]
    from pipeline.sweep.statistics import cell_rows
    from tests.pipeline.sweep.made import made_table

    found = cell_rows(more, made_table(cell, 0.1, 0))
    assert found.reasons == (*[None] * 7, "missing", "missing")
    np.testing.assert_array_equal(found.outputs[:7], rows.outputs)


def test_cells_are_measured_over_the_slides_that_all_have_and_ranked() -> None:
    cohort = made_cohort(N)
    rows = made_rows(made_cells(cohort, ["good", "worse"]), [0.3, 2.0], failed=(3, 50))
    result = made_result(rows[::-1])
    assert [one.rows.cell.scoring.model.name for one in result.results] == ["good", "worse"]
    assert (result.shared.sum(), [one.failures for one in result.results]) == (N - 2, [2, 0])
    y = np.array([slide.labels["tumour"] == "yes" for slide in cohort.slides])
    for one in result.results:
        area = roc_auc_score(y[result.shared], one.rows.outputs[result.shared, 1])
        assert one.headline.value == pytest.approx(area)
        assert one.headline.low < area < one.headline.high
        assert one.found.scores["threshold"] == 0.4
    good, worse = result.results
    assert good.if_wrong["auc"] < good.headline.value  # its own two failures
    whole = roc_auc_score(y, worse.rows.outputs[:, 1])
    assert worse.if_wrong["auc"] == pytest.approx(whole)  # it has none: over all slides
    assert worse.patients == len(
        {slide.patient_id for slide, kept in zip(cohort.slides, result.shared, strict=True) if kept}
    )


def test_pairs_are_of_all_cells_and_adjusted_together() -> None:
    result = made_result(made_rows(made_cells(made_cohort(N), ["a", "b", "c", "d"]), [0.2, 0.3, 1.0, 3.0]))
    assert len(result.pairs) == 6
    assert [pair.adjusted for pair in result.pairs] == holm([pair.difference.p for pair in result.pairs])
    for pair in result.pairs:
        assert pair.difference.value == pytest.approx(pair.first.headline.value - pair.second.headline.value)
        assert pair.delong is not None
        assert pair.delong.value == pytest.approx(pair.difference.value)
        assert (pair.difference.low, pair.difference.high) == pytest.approx(
            (pair.delong.low, pair.delong.high), abs=0.05
        )
    first_last = next(
        p for p in result.pairs if p.second.rows.cell.scoring.model.name == "d" and p.first is result.results[0]
    )
    assert first_last.adjusted < 0.05


def test_a_cell_without_predictions_does_not_empty_the_comparison() -> None:
    rows = made_rows(made_cells(made_cohort(N), ["none", "good"]), [0.3, 0.3], failed=tuple(range(N)))
    result = made_result(rows)
    assert [one.cell.scoring.model.name for one in result.without] == ["none"]
    assert (len(result.results), result.shared.sum()) == (1, N)
    nothing = made_result(rows[:1])
    assert (nothing.results, nothing.pairs, nothing.shared.sum()) == ((), (), 0)


def test_labels_of_one_class_leave_what_they_can_give() -> None:
    cohort = made_cohort(12)
    cohort = replace(cohort, slides=tuple(replace(slide, labels={"tumour": "yes"}) for slide in cohort.slides))
    result = made_result(made_rows(made_cells(cohort, ["a", "b"]), [0.3, 0.3]))
    assert all(np.isnan(one.headline.value) for one in result.results)
    assert all("accuracy" in one.found.scores for one in result.results)
    assert result.pairs == ()


def test_the_slides_that_most_are_wrong_about_come_first() -> None:
    rows = made_rows(made_cells(made_cohort(N), ["a", "b", "c"]), [0.3, 0.3, 3.0], failed=(4,))
    task = rows[0].cell.scoring.config.tasks[0]
    found = most_wrong(rows, task, 0)
    counts = [count for _, count, _ in found]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= 1
    y = [slide.labels["tumour"] == "yes" for slide in rows[0].cell.cohort.slides]
    for place, wrong, judged in found:
        assert wrong == sum(one.predicted[place] and (one.outputs[place, 1] > 0.5) != y[place] for one in rows)
        assert judged == (2 if place == 4 else 3)
