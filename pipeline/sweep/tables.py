"""The tables of a report: one row a cell and task, a pair of cells, a stratum, a slide; for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from pipeline.results.strata import Stratum
from pipeline.sweep.statistics import CellResult, CellRows, CohortResult

Row = dict[str, Any]


def cells_table(results: Sequence[CohortResult]) -> pa.Table:
    """One row a cell and task, the best first in each cohort."""
    return _table([row for one in results for row in [*map(_cell, one.results), *_without(one)]])


def _cell(result: CellResult) -> Row:
    cell = result.rows.cell
    bounds = {
        f"{name}_{end}": getattr(found, end) for name, found in result.found.measures.items() for end in ("low", "high")
    }
    return {
        **_named(result.rows),
        "task": result.task.name,
        "slides": result.slides,
        "patients": result.patients,
        "cohort_slides": len(cell.cohort.slides),
        "failures": result.failures,
        "seen_slides": result.seen,
        **bounds,
        **result.found.scores,
        **{f"{name}_if_failures_wrong": value for name, value in result.if_wrong.items()},
        **result.rows.costs,
        "device": result.rows.device,
    }


def _without(one: CohortResult) -> list[Row]:
    """Cells that nothing can be said of."""
    return [
        {**_named(rows), "slides": 0, "cohort_slides": len(one.cohort.slides), "failures": len(one.cohort.slides)}
        for rows in one.without
    ]


def _named(rows: CellRows) -> Row:
    cell = rows.cell
    return {
        "cell": cell.digest,
        "cohort": cell.cohort.name,
        "model": cell.scoring.model.name,
        "origin": cell.scoring.model.origin,
        **asdict(cell.scoring.setting),
    }


def pairs_table(results: Sequence[CohortResult]) -> pa.Table:
    """One row a pair of cells and task: first minus second."""
    rows: list[Row] = []
    for one in results:
        for pair in one.pairs:
            check = pair.delong
            rows.append(
                {
                    "cohort": one.cohort.name,
                    "task": pair.first.task.name,
                    "first": pair.first.rows.cell.scoring.name,
                    "second": pair.second.rows.cell.scoring.name,
                    "first_cell": pair.first.rows.cell.digest,
                    "second_cell": pair.second.rows.cell.digest,
                    **asdict(pair.difference),
                    "p_holm": pair.adjusted,
                    "delong_low": check.low if check else None,
                    "delong_high": check.high if check else None,
                    "delong_p": check.p if check else None,
                    "seen": bool(pair.first.seen or pair.second.seen),
                }
            )
    return _table(rows)


def strata_table(results: Sequence[CohortResult]) -> pa.Table:
    """One row a cell, task and group."""
    return _table([_stratum(result, part) for one in results for result in one.results for part in result.strata])


def _stratum(result: CellResult, part: Stratum) -> Row:
    cell = result.rows.cell
    return {
        "cohort": cell.cohort.name,
        "model": cell.scoring.model.name,
        "setting": cell.scoring.setting.text,
        "cell": cell.digest,
        "task": part.task,
        "column": part.column,
        "value": part.value,
        "slides": part.slides,
        "patients": part.patients,
        "judged": part.measures is not None,
        **(part.measures or {}),
    }


def calibration_table(results: Sequence[CohortResult]) -> pa.Table:
    """One row a cell, task, class and group of like probability."""
    rows: list[Row] = []
    for one in results:
        for result in one.results:
            for name, found in result.calibrations(one.shared).items():
                groups = zip(found.predicted, found.share, found.low, found.high, found.counts, strict=True)
                for predicted, share, low, high, count in groups:
                    rows.append(
                        {
                            "cohort": one.cohort.name,
                            "model": result.rows.cell.scoring.model.name,
                            "setting": result.rows.cell.scoring.setting.text,
                            "cell": result.rows.cell.digest,
                            "task": result.task.name,
                            "class": name,
                            "predicted": float(predicted),
                            "share": float(share),
                            "low": float(low),
                            "high": float(high),
                            "slides": int(count),
                        }
                    )
    return _table(rows)


def predictions_table(rows: Sequence[CellRows]) -> pa.Table:
    """One row a slide and cell."""
    parts = []
    for one in rows:
        cell, n = one.cell, len(one.cell.cohort.slides)
        columns = [column for task in cell.scoring.config.tasks for column in task.output_columns]
        values = {name: pa.array(one.outputs[:, k], from_pandas=True) for k, name in enumerate(columns)}
        costs = {name: pa.array(column) for name, column in one.columns.items()}
        parts.append(
            pa.table(
                {
                    "cohort": pa.array([cell.cohort.name] * n),
                    "slide_id": pa.array([slide.slide_id for slide in cell.cohort.slides], pa.string()),
                    "patient_id": pa.array(cell.cohort.patients, pa.string()),
                    "uri": pa.array([slide.uri for slide in cell.cohort.slides], pa.string()),
                    "model": pa.array([cell.scoring.model.name] * n),
                    "setting": pa.array([cell.scoring.setting.text] * n),
                    "cell": pa.array([cell.digest] * n),
                    **values,
                    **costs,
                    "reason": pa.array(one.reasons, pa.string()),
                }
            )
        )
    return pa.concat_tables(parts)


def _table(rows: Sequence[Row]) -> pa.Table:
    """All columns that any row has."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
