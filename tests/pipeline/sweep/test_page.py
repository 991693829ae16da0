"""The page says what the tables say, and what is missing."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.recipe import Config
from pipeline.sweep.page import flat_point, sweep_page
from pipeline.sweep.statistics import CohortResult, most_wrong
from tests.pipeline.small import small_config
from tests.pipeline.sweep.made import made_cells, made_cohort, made_result, made_rows


def _config() -> Config:
    return small_config(sweep={"models": {"a": "last"}, "cohorts": {"all": "cohort.csv"}, "resamples": 300})


def _results() -> list[CohortResult]:
    cells = made_cells(made_cohort(97), ["good <1>", "other"], memory=(2, 4, 8))
    return [made_result(made_rows(cells, [3.0, 0.5, 0.45, 2.0, 0.7, 0.6], failed=(5,)))]


def test_the_page_stands_alone_and_says_what_is_known() -> None:
    results = _results()
    task = results[0].results[0].task
    place, _, _ = most_wrong([one.rows for one in results[0].results], task, 0)[0]
    overlays = {("all", f"s{place}"): "overlays/3.png"}
    page = sweep_page(_config(), results, {"lost": "it is gone"}, ["x (exact): cannot"], overlays)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "good &lt;1&gt;" in page
    assert "lost has no results: it is gone" in page
    assert "Left out: x (exact): cannot" in page
    assert "Compared over <b>96</b> slides" in page
    assert "s5 (odd)" in page
    for result in results[0].results:
        assert f"{result.headline.value:.3f}" in page
        assert f"{result.headline.low:.3f} to {result.headline.high:.3f}" in page
    assert "too few to judge" in page
    assert "The diamond is the flat point" in page
    assert "DeLong" in page
    assert 'href="overlays/3.png"' in page


def test_the_flat_point_is_the_least_m_that_is_as_good() -> None:
    (result,) = _results()
    own = [one for one in result.results if one.rows.cell.scoring.model.name == "good <1>"]
    found = flat_point(own, result.pairs)
    assert found is not None
    assert found.rows.cell.scoring.setting.memory == 4  # 2 is worse, and 8 no better
    assert flat_point([], ()) is None


def test_a_cohort_in_which_nothing_could_be_compared_is_told(tmp_path: Path) -> None:
    rows = made_rows(made_cells(made_cohort(9), ["none"]), [0.2], failed=tuple(range(9)))
    page = sweep_page(_config(), [made_result(rows)], {}, [], {})
    assert "predicted no slide and is not compared" in page
