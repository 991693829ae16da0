"""The report of a sweep as a folder: page, tables, plans of resamples; and its runs in MLflow.

`<root>/sweeps/reports/<name>-<fingerprint>/`, of which `report.json` is the commit: what is to be said follows from
the cells, their rows and the report's own settings, so one that stands is not made again.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.results.tables import table_csv
from pipeline.storage.files import exists, is_remote, join, write_bytes, write_json
from pipeline.storage.lease import Lease
from pipeline.sweep import tables
from pipeline.sweep.cells import Expansion
from pipeline.sweep.cohorts import SweptCohort
from pipeline.sweep.overlays import draw_overlays
from pipeline.sweep.page import sweep_page
from pipeline.sweep.rows import contents_of
from pipeline.sweep.statistics import CellResult, CellRows, CohortResult, cell_rows, cohort_result, most_wrong
from pipeline.tracking.tracker import Tracker, open_tracking
from pipeline.workflow.lineage import lineage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Swept:
    """A sweep all of whose rows are there."""

    config: Config
    expansion: Expansion
    cohorts: tuple[SweptCohort, ...]
    tables: Mapping[str, pa.Table]
    """Digest of a scoring -> its rows."""
    failed: Mapping[str, str]
    """Model -> why it has no cells."""

    @cached_property
    def rows(self) -> tuple[CellRows, ...]:
        """Of each cell."""
        return tuple(cell_rows(cell, self.tables[cell.scoring.digest]) for cell in self.expansion.cells)

    @property
    def failures(self) -> int:
        """Slides without a prediction, over all cells."""
        return sum(int((~one.predicted).sum()) for one in self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """Of all that the report says."""
        assert self.config.sweep is not None
        cells = [[one.cell.digest, one.cell.scoring.name, one.cell.cohort.name, list(one.reasons)] for one in self.rows]
        said = self.config.sweep.model_dump(mode="json", include={"resamples", "few", "allow_seen", "overlays"})
        thresholds = [dict(cell.scoring.model.thresholds) for cell in self.expansion.cells]
        return fingerprint([cells, said, thresholds, self.config.seed, dict(self.failed), self.expansion.left_out])

    def results(self) -> list[CohortResult]:
        """What can be said of each cohort."""
        sweep = self.config.sweep
        assert sweep is not None
        found = []
        contents = contents_of(self.tables)
        for cohort in self.cohorts:
            own = [one for one in self.rows if one.cell.cohort is cohort]
            models = {one.cell.scoring.model.digest: one.cell.scoring.model.seen for one in own}
            seen = {
                digest: None if known is None else len(cohort.known_to(known, contents))
                for digest, known in models.items()
            }
            found.append(
                cohort_result(cohort, own, resamples=sweep.resamples, seed=self.config.seed, few=sweep.few, seen=seen)
            )
        return found


def write_report(swept: Swept, root: str, lease: Lease) -> tuple[str, str | None]:
    """The page's URI, and the MLflow run that it was logged in; None where the report stood already.

    Raises:
        StageError: no cell has any prediction.
    """
    if not any(one.predicted.any() for one in swept.rows):
        reasons = sorted({str(reason) for one in swept.rows for reason in one.reasons})
        raise StageError(f"sweep: no slide could be predicted by any model ({', '.join(reasons)}); see the log")
    folder = join(root, "reports", f"{swept.config.name}-{swept.fingerprint}")
    page = join(folder, "report.html")
    if exists(join(folder, "report.json")):
        return page, None
    results = swept.results()
    overlays = _overlays(swept, results, root, folder)
    text = sweep_page(swept.config, results, swept.failed, swept.expansion.left_out, overlays)
    found = _tables(results, swept.rows)
    lease.check()
    for name, table in found.items():
        write_bytes(join(folder, f"{name}.parquet"), _parquet(table))
        write_bytes(join(folder, f"{name}.csv"), table_csv(table))
    for one in results:
        write_bytes(join(folder, f"resamples-{one.cohort.name}.parquet"), _parquet(one.plan.table()))
    write_bytes(page, text.encode())
    run_id = _log(swept, results, text, found)
    write_json(
        join(folder, "report.json"), {"cells": [cell.digest for cell in swept.expansion.cells], "run_id": run_id}
    )
    return page, run_id


def _tables(results: Sequence[CohortResult], rows: Sequence[CellRows]) -> dict[str, pa.Table]:
    return {
        "cells": tables.cells_table(results),
        "pairs": tables.pairs_table(results),
        "strata": tables.strata_table(results),
        "calibration": tables.calibration_table(results),
        "predictions": tables.predictions_table(rows),
    }


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _overlays(swept: Swept, results: Sequence[CohortResult], root: str, folder: str) -> dict[tuple[str, str], str]:
    """(cohort, slide) -> where its picture lies, from the page's folder; of the slides that most models get wrong."""
    assert swept.config.sweep is not None
    found: dict[tuple[str, str], str] = {}
    for one in results:
        if not one.results or not swept.config.sweep.overlays:
            continue
        best = one.results[0]
        ranked = most_wrong([cell.rows for cell in one.results if cell.task is best.task], best.task, 0)
        places = [place for place, _, _ in ranked[: swept.config.sweep.overlays]]
        drawn = draw_overlays(swept.config, best.rows.cell, places, root)
        for place, picture in drawn.items():
            name = f"overlays/{one.cohort.name}-{place}.png"
            write_bytes(join(folder, name), picture)
            found[one.cohort.name, one.cohort.slides[place].slide_id] = name
    return found


def _log(swept: Swept, results: Sequence[CohortResult], page: str, found: Mapping[str, pa.Table]) -> str:
    """A run for the sweep, and a child for each cell."""
    config = swept.config
    assert config.tracking.uri is not None  # compose.py fills both
    assert config.tracking.experiment is not None
    root = config.storage.root
    if not is_remote(root):
        Path(root).mkdir(parents=True, exist_ok=True)
    tracker = open_tracking(config.tracking.uri, config.tracking.experiment, join(root, "artifacts"))
    tags = {**lineage(config), "kind": "sweep", "sweep": swept.fingerprint}
    with tracker.run(f"{config.name} sweep", tags=tags) as parent:
        tracker.log_text(parent, page, "report.html")
        for name, table in found.items():
            tracker.log_text(parent, table_csv(table).decode(), f"{name}.csv")
        tracker.log_metrics(parent, {"cells": len(swept.expansion.cells), "failures": swept.failures})
        for one in results:
            cells = {cell.rows.cell.digest: cell.rows for cell in one.results}
            for digest, rows in cells.items():
                own = [result for result in one.results if result.rows is rows]
                _log_cell(tracker, parent, digest, own, {**lineage(config), "sweep": swept.fingerprint})
    return str(parent)


def _log_cell(
    tracker: Tracker, parent: str, digest: str, results: Sequence[CellResult], tags: Mapping[str, str]
) -> None:
    """A child run: what it is as tags to filter by, what it measures, what it costs."""
    cell = results[0].rows.cell
    model, setting = cell.scoring.model, asdict(cell.scoring.setting)
    own = {
        "kind": "sweep cell",
        "cell": digest,
        "model": model.name,
        "model_origin": model.origin,
        "model_digest": model.digest,
        "cohort": cell.cohort.name,
        "cohort_digest": cell.cohort.digest,
        **{key: str(value) for key, value in setting.items() if value is not None},
        "seen": "unknown" if results[0].seen is None else str(results[0].seen),
    }
    metrics: dict[str, float] = {"failures": results[0].failures, **results[0].rows.costs}
    for result in results:
        end = f"_{result.task.name}" if len(cell.scoring.config.tasks) > 1 else ""
        metrics |= {f"{name}{end}": value for name, value in result.found.scores.items()}
        for name, found in result.found.measures.items():
            bounds = {f"{name}{end}_low": found.low, f"{name}{end}_high": found.high}
            metrics |= {key: value for key, value in bounds.items() if value == value}
        metrics[f"slides{end}"] = result.slides
    with tracker.run(f"{model.name} on {cell.cohort.name}", parent, {**tags, **own}) as run_id:
        tracker.log_params(run_id, {"model": model.name, "cohort": cell.cohort.name, **setting})
        tracker.log_metrics(run_id, metrics)
