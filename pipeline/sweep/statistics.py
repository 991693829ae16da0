"""From rows to what can be said: each cell over the slides that all cells of a cohort have, and how cells differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.cohort.labels import truth
from pipeline.config.data import TaskConfig
from pipeline.inference.intervals import Interval, floor
from pipeline.inference.measured import Measured, measured
from pipeline.inference.metrics import MEASURES, Floats, labelled
from pipeline.inference.operating import Reliability
from pipeline.inference.resampling import Difference, ResamplingPlan, delong, draw_plan, holm, paired_difference
from pipeline.inference.scores import calibrations, with_failures
from pipeline.results.strata import Stratum, strata
from pipeline.sweep.cells import Cell
from pipeline.sweep.cohorts import SweptCohort

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class CellRows:
    """The rows of a cell, in the order of its cohort's n slides; equal to itself alone, as what follows."""

    cell: Cell
    outputs: Floats
    """(n, K) of all tasks, one after the other; NaN where there is no prediction."""
    reasons: tuple[str | None, ...]
    """Why there is none."""
    columns: Mapping[str, Floats]
    """patches_scored, patches_total, seconds, read_seconds, bytes_read, peak_bytes: (n,)."""
    device: str

    @property
    def predicted(self) -> Bools:
        """(n,) which slides have a prediction."""
        return labelled(self.outputs)

    def values(self, number: int) -> Floats:
        """(n, K) of one task."""
        tasks = self.cell.scoring.config.tasks
        start = sum(len(task.outputs) for task in tasks[:number])
        return self.outputs[:, start : start + len(tasks[number].outputs)]

    @property
    def costs(self) -> dict[str, float]:
        """What a slide took: its own seconds and those of reading, patches a second, GiB at the peak."""
        there = self.predicted
        if not there.any():
            return {}
        mean = {name: float(column[there].mean()) for name, column in self.columns.items()}
        spent = mean["seconds"] + mean["read_seconds"]
        return {
            "seconds_a_slide": mean["seconds"],
            "read_seconds_a_slide": mean["read_seconds"],
            "patches_a_second": mean["patches_total"] / spent if spent else 0.0,
            "patches_a_slide": mean["patches_total"],
            "peak_gib": float(self.columns["peak_bytes"][there].max()) / 2**30,
        }


COSTS = ("patches_scored", "patches_total", "seconds", "read_seconds", "bytes_read", "peak_bytes")


def cell_rows(cell: Cell, table: pa.Table) -> CellRows:
    """A cell's rows out of those of its scoring; a slide that has none failed as `missing`."""
    places = {source: place for place, source in enumerate(table["source"].to_pylist())}
    found = [places.get(source) for source in cell.cohort.sources]
    width = sum(len(task.outputs) for task in cell.scoring.config.tasks)
    rows = table.take(pa.array(found, pa.int64()))
    outputs = np.full((len(found), width), np.nan)
    there = rows["outputs"].is_valid().to_numpy(zero_copy_only=False)
    flat = rows["outputs"].combine_chunks().drop_null().flatten()
    outputs[there] = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
    reasons = rows["reason"].to_pylist()
    return CellRows(
        cell=cell,
        outputs=outputs,
        reasons=tuple(None if ok else reason or "missing" for ok, reason in zip(there.tolist(), reasons, strict=True)),
        columns={name: rows[name].fill_null(0).to_numpy().astype(np.float64) for name in COSTS},
        device=next((name for name in rows["device"].to_pylist() if name), ""),
    )


@dataclass(frozen=True, eq=False)
class CellResult:
    """One task of one cell, over the slides that all cells of the cohort have."""

    rows: CellRows
    task: TaskConfig
    truths: Floats
    """(n,) or (n, W) of the cohort's slides, as of `labels.truth`."""
    slides: int
    """That have a label, among those."""
    patients: int
    failures: int
    """Slides of the cohort without a prediction."""
    found: Measured
    if_wrong: Mapping[str, float]
    """The measures over all slides of the cohort, if those without a prediction had been predicted wrong."""
    strata: tuple[Stratum, ...]
    seen: int | None
    """Slides that the model knows; None where that is not known."""

    @property
    def headline(self) -> Interval:
        """What cells are compared by."""
        return self.found.measures[MEASURES[self.task.kind][0]]

    def calibrations(self, shared: Bools) -> dict[str, Reliability]:
        """Of each class, over the slides (n,) that all cells have."""
        values = self.rows.values(self.rows.cell.scoring.config.tasks.index(self.task))
        return calibrations(self.task, values[shared], self.truths[shared])


@dataclass(frozen=True, eq=False)
class Pair:
    """How two cells differ in one task."""

    first: CellResult
    second: CellResult
    difference: Difference
    adjusted: float
    """p among all pairs of the cohort and task (Holm)."""
    delong: Difference | None
    """As a cross-check, of binary tasks."""


@dataclass(frozen=True, eq=False)
class CohortResult:
    """All cells of a cohort."""

    cohort: SweptCohort
    plan: ResamplingPlan
    shared: Bools
    """(n,) the slides that all cells have: what they are compared over."""
    results: tuple[CellResult, ...]
    """Task by task, the best first."""
    pairs: tuple[Pair, ...]
    without: tuple[CellRows, ...]
    """Cells without any prediction, which are left out of the comparison."""


def cohort_result(
    cohort: SweptCohort,
    rows: Sequence[CellRows],
    *,
    resamples: int,
    seed: int,
    few: int,
    seen: Mapping[str, int | None],
) -> CohortResult:
    """Measure and compare.

    Args:
        cohort: whose cells they are.
        rows: of each cell.
        resamples: B, of the cohort's patients.
        seed: of these.
        few: patients below which a stratum is not judged.
        seen: digest of a model -> slides of the cohort that it knows.
    """
    tasks = rows[0].cell.scoring.config.tasks
    plan = draw_plan(cohort.patients, cohort.strata(tasks[0]), resamples, seed)
    used = [one for one in rows if one.predicted.any()]
    shared: Bools = (
        np.logical_and.reduce([one.predicted for one in used]) if used else np.zeros(len(cohort.slides), bool)
    )
    results: list[CellResult] = []
    pairs: list[Pair] = []
    weights = plan.weights([patient for patient, kept in zip(cohort.patients, shared, strict=True) if kept])
    for number, task in enumerate(tasks):
        y = np.array([truth(task, slide.labels[task.name]) for slide in cohort.slides])
        found = [_result(one, number, task, y, shared, weights, few, seen) for one in used] if shared.any() else []
        found.sort(key=lambda one: _rank(one.headline.value))
        results += found
        pairs += _pairs(found, task, y, shared, cohort.patients, number)
    without = tuple(one for one in rows if not one.predicted.any())
    return CohortResult(cohort, plan, shared, tuple(results), tuple(pairs), without)


def _rank(value: float) -> float:
    """The best first, what cannot be measured last."""
    return float("inf") if np.isnan(value) else -value


def _result(
    rows: CellRows,
    number: int,
    task: TaskConfig,
    y: Floats,
    shared: Bools,
    weights: npt.NDArray[np.uint8],
    few: int,
    seen: Mapping[str, int | None],
) -> CellResult:
    values, known = rows.values(number), labelled(y)
    cohort, model = rows.cell.cohort, rows.cell.scoring.model
    patients = [patient for patient, kept in zip(cohort.patients, shared, strict=True) if kept]
    found = measured(task, values[shared], y[shared], patients, weights, model.thresholds.get(task.name))
    return CellResult(
        rows=rows,
        task=task,
        truths=y,
        slides=int((shared & known).sum()),
        patients=len({patient for patient, kept in zip(cohort.patients, shared & known, strict=True) if kept}),
        failures=int((~rows.predicted).sum()),
        found=found,
        if_wrong=with_failures(task, values, y),
        strata=tuple(strata(cohort.slides, task, values, y, few, shared)),
        seen=seen[model.digest],
    )


def _pairs(
    found: Sequence[CellResult], task: TaskConfig, y: Floats, shared: Bools, patients: Sequence[str], number: int
) -> list[Pair]:
    """Of all cells that can be measured, two by two, the better one first."""
    usable = [one for one in found if not np.isnan(one.headline.low)]
    if len(usable) < 2:
        return []
    known = shared & labelled(y)
    kept = [patient for patient, there in zip(patients, known, strict=True) if there]
    least = floor(task, MEASURES[task.kind][0], y[known], kept)
    both = list(combinations(usable, 2))
    differences = [
        paired_difference(
            (a.headline.value, b.headline.value), (a.found.resampled[:, 0], b.found.resampled[:, 0]), least=least
        )
        for a, b in both
    ]
    adjusted = holm([one.p for one in differences])
    checks: Iterator[Difference | None] = iter([None] * len(both))
    if task.kind == "binary":
        checks = (
            delong((a.rows.values(number)[known, 1], b.rows.values(number)[known, 1]), y[known] == 1, kept)
            for a, b in both
        )
    return [
        Pair(a, b, difference, p, check)
        for (a, b), difference, p, check in zip(both, differences, adjusted, checks, strict=True)
    ]


def most_wrong(rows: Sequence[CellRows], task: TaskConfig, number: int) -> list[tuple[int, int, int]]:
    """(place of a slide, cells that are wrong about it, cells that predict it), the most often wrong first."""
    if task.kind in ("regression", "survival") or not rows:
        return []
    slides = rows[0].cell.cohort.slides
    y = np.array([truth(task, slide.labels[task.name]) for slide in slides])
    known = labelled(y)
    wrong, judged = np.zeros(len(slides), np.int64), np.zeros(len(slides), np.int64)
    for one in rows:
        p = np.nan_to_num(one.values(number))
        called = (p >= 0.5) != (y == 1) if task.kind == "multilabel" else p.argmax(axis=1) != y
        there = one.predicted & known
        wrong += there & (called.any(axis=1) if called.ndim == 2 else called)
        judged += there
    order = np.lexsort((np.arange(len(slides)), -wrong))
    return [(int(place), int(wrong[place]), int(judged[place])) for place in order if wrong[place]]
