"""Cells and rows made up, for what is said of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cohort.table import CohortSlide
from pipeline.config.sweep import SettingsGrid
from pipeline.model.folder import Seen
from pipeline.schema import SWEEP_ROWS
from pipeline.sweep.cells import Cell, expand
from pipeline.sweep.cohorts import SweptCohort
from pipeline.sweep.models import SweepModel
from pipeline.sweep.rows import Row
from pipeline.sweep.statistics import CellRows, CohortResult, cell_rows, cohort_result
from tests.pipeline.small import small_config


def made_cohort(n: int, name: str = "all") -> SweptCohort:
    """Every third slide is positive; two slides a patient; sites a, b and, of three slides, c."""
    slides = tuple(
        CohortSlide(
            f"s{i}",
            f"/s{i}",
            f"p{i // 2}",
            None,
            None,
            {"tumour": "no" if i % 3 else "yes"},
            {"site": "c" if i < 3 else "ab"[i % 2]},
        )
        for i in range(n)
    )
    return SweptCohort(name, "cohort.csv", slides, tuple(f"source{i}" for i in range(n)), {})


def made_cells(cohort: SweptCohort, names: list[str], **grid: Any) -> list[Cell]:
    """A model each, under the settings of a grid."""
    models = [
        SweepModel(
            name,
            f"models:/{name}/1",
            f"digest-{name}",
            small_config(),
            "/folder",
            100,
            {"tumour": 0.4},
            Seen(frozenset(), frozenset()),
        )
        for name in names
    ]
    return list(expand(models, [cohort], SettingsGrid(**grid)).cells)


def made_table(cell: Cell, noise: float, seed: int, failed: tuple[int, ...] = ()) -> pa.Table:
    """Rows of a scoring: as good as the noise lets it be; the cohort's slides share what is hard about them."""
    rows: list[Row] = []
    hard = np.random.default_rng(0).normal(0, 0.5, len(cell.cohort.slides))
    own = np.random.default_rng(seed).normal(0, noise, len(cell.cohort.slides))
    for i, (slide, source) in enumerate(zip(cell.cohort.slides, cell.cohort.sources, strict=True)):
        positive = 1 / (1 + np.exp(-((1.0 if slide.labels["tumour"] == "yes" else -1.0) + hard[i] + own[i])))
        plain: Row = {field.name: None if field.nullable else 0 for field in SWEEP_ROWS}
        plain |= {"scoring": cell.scoring.digest, "source": source, "slide_id": slide.slide_id, "precision": "float32"}
        plain |= {"device": "CPU", "patches_scored": 20, "patches_total": 20, "seconds": 0.25, "read_seconds": 0.5}
        outcome: Row = {"outputs": [1 - positive, positive]} if i not in failed else {"reason": "odd", "message": "no"}
        rows.append({**plain, **outcome})
    return pa.Table.from_pylist(rows[::-1], SWEEP_ROWS)  # in no order


def made_rows(cells: list[Cell], noises: list[float], failed: tuple[int, ...] = ()) -> list[CellRows]:
    """Of each cell; the first one's `failed` slides have no prediction."""
    return [
        cell_rows(cell, made_table(cell, noise, seed, failed if seed == 0 else ()))
        for seed, (cell, noise) in enumerate(zip(cells, noises, strict=True))
    ]


def made_result(rows: list[CellRows], few: int = 5) -> CohortResult:
    """Of one cohort."""
    seen = {one.cell.scoring.model.digest: 0 for one in rows}
    return cohort_result(rows[0].cell.cohort, rows, resamples=300, seed=1, few=few, seen=seen)
