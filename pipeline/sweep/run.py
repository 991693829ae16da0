"""A sweep from its config to its report: what is there is used, what is missing is scored, once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.cluster import connected
from pipeline.config.recipe import Config
from pipeline.config.sweep import SweepConfig
from pipeline.errors import ConfigError, StageError
from pipeline.progress import progress
from pipeline.results.parts import pooled_in_parts
from pipeline.results.pool import Room, pooled
from pipeline.storage.files import exists, join, write_json
from pipeline.storage.lease import Lease, held
from pipeline.storage.scratch import scratch_folder
from pipeline.sweep.cells import Cell, Expansion, expand
from pipeline.sweep.cohorts import SweptCohort, check_unseen, read_cohorts
from pipeline.sweep.models import SweepModel, keep, resolve_models, same_tasks
from pipeline.sweep.reports import Swept, write_report
from pipeline.sweep.rows import Row, RowStore, contents_of, done_sources
from pipeline.sweep.scoring import Reading, Task, lost, readings
from pipeline.workflow.run import ensure_cohort

log = logging.getLogger(__name__)

_COMMIT_S = 20.0
"""Rows are committed this often: what a kill may lose."""
_COMMIT_ROWS = 2_000


@dataclass(frozen=True)
class Prepared:
    """All that is known before anything is scored."""

    models: tuple[SweepModel, ...]
    failed: Mapping[str, str]
    """Model -> why it cannot be had."""
    cohorts: tuple[SweptCohort, ...]
    expansion: Expansion
    tables: Mapping[str, pa.Table]
    """Digest of a scoring -> its rows."""
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class SweepResult:
    """What one invocation did."""

    outcome: str
    """done, or nothing to do."""
    report: str
    scored: int
    """Rows that were made."""
    failed: Mapping[str, str]
    """Model -> why it has no cells."""
    cells: int
    failures: int
    """Slides without a prediction, over all cells."""
    run_id: str | None
    """The MLflow run; None where nothing had to be done."""


def sweep_root(config: Config) -> str:
    """Where a recipe's sweeps lie."""
    return join(config.storage.root, "sweeps")


def plan(config: Config) -> dict[str, Any]:
    """What `run` would do, as plain data; changes nothing."""
    _swept(config)
    with scratch_folder() as scratch:
        found = _prepare(config, scratch)
    return {
        "cells": _planned(config, found),
        "left_out": list(found.expansion.left_out),
        "failed": dict(found.failed),
        "passes": [
            {
                "slides": len(one.tasks),
                "models": list(one.models),
                "scorings": [scoring.name for scoring in one.work.scorings],
                "mpp": one.work.scorings[0].config.tiling.mpp,
                "models_gib": round(one.bytes / 2**30, 3),
            }
            for one in found.readings
        ],
    }


def run(config: Config) -> SweepResult:
    """Score what is missing and write the report, unless it stands.

    Raises:
        ConfigError: what is asked makes no sense; all problems of a kind at once.
        CohortError: a cohort is wrong.
        StageError: no model, or no slide, could be used; or this sweep runs elsewhere.
    """
    swept = _swept(config)
    ensure_cohort(config)
    root = sweep_root(config)
    with scratch_folder() as scratch, held(join(root, "sweep.lease"), f"sweep of {config.name}") as lease:
        found = _prepare(config, scratch)
        scored = 0
        if found.readings:
            found, scored = _score_all(config, found, lease)
        if not swept.allow_seen:
            contents = contents_of(found.tables)
            for cohort in found.cohorts:
                check_unseen(cohort, found.models, contents)
        results = Swept(config, found.expansion, found.cohorts, found.tables, found.failed)
        report, run_id = write_report(results, root, lease)
        for cell in found.expansion.cells:
            write_json(_cell_uri(root, cell), {"model": cell.scoring.model.origin, "cohort": cell.cohort.uri})
    return SweepResult(
        outcome="done" if run_id is not None else "nothing to do",
        report=report,
        scored=scored,
        failed=found.failed,
        cells=len(found.expansion.cells),
        failures=results.failures,
        run_id=run_id,
    )


def _swept(config: Config) -> SweepConfig:
    if config.sweep is None:
        raise ConfigError("config", ["sweep: is required; name models and cohorts, as conf/demo_sweep.yaml does"])
    empty = [name for name in ("models", "cohorts") if not getattr(config.sweep, name)]
    if empty:
        raise ConfigError("config", [f"sweep.{name}: is empty; name one at least" for name in empty])
    return config.sweep


def _cell_uri(root: str, cell: Cell) -> str:
    return join(root, "cells", f"{cell.digest}.json")


def _prepare(config: Config, scratch: Path) -> Prepared:
    swept, root = _swept(config), sweep_root(config)
    models, failed = resolve_models(config, scratch)
    same_tasks(models)
    cohorts = read_cohorts(config, models[0])
    expansion = expand(models, cohorts, swept.grid)
    store = RowStore(root)
    tables = {digest: store.read(digest) for digest in dict.fromkeys(c.scoring.digest for c in expansion.cells)}
    if not swept.allow_seen:
        for cohort in cohorts:
            check_unseen(cohort, models, contents_of(tables))
    done = {digest: done_sources(table) for digest, table in tables.items()}
    needed = readings(expansion.cells, done, swept.models_gib, config.storage.patches)
    return Prepared(tuple(models), failed, tuple(cohorts), expansion, tables, tuple(needed))


def _planned(config: Config, found: Prepared) -> list[dict[str, Any]]:
    """Each cell, and whether it is done, shares all its rows with others, or has new ones."""
    root, claimed = sweep_root(config), set[tuple[str, str]]()
    done = {digest: done_sources(table) for digest, table in found.tables.items()}
    rows = []
    for cell in found.expansion.cells:
        digest = cell.scoring.digest
        missing = {(digest, source) for source in cell.cohort.sources if source not in done[digest]}
        new = missing - claimed
        claimed |= missing
        there = not missing and exists(_cell_uri(root, cell))
        rows.append(
            {
                "cell": cell.digest,
                "model": cell.scoring.model.name,
                "origin": cell.scoring.model.origin,
                "setting": cell.scoring.setting.text,
                "cohort": cell.cohort.name,
                "slides": len(cell.cohort.slides),
                "to_score": len(new),
                "state": "new" if new else "done" if there else "shared",
            }
        )
    return rows


def _score_all(config: Config, found: Prepared, lease: Lease) -> tuple[Prepared, int]:
    """Score all that is missing; the same, with the rows, and how many they are."""
    root = sweep_root(config)
    folders = {model.digest: keep(model, root) for model in found.models}
    store, scored = RowStore(root), 0
    for number, one in enumerate(found.readings, start=1):
        log.info(
            "sweep: pass %d of %d: %d slides for %s", number, len(found.readings), len(one.tasks), ", ".join(one.models)
        )
        moved = tuple(
            replace(scoring, model=replace(scoring.model, folder=folders[scoring.model.digest]))
            for scoring in one.work.scorings
        )
        with _committing(store, lease) as commit, progress("sweep", len(one.tasks), "slides") as steps:
            for rows in _scored(config, replace(one, work=replace(one.work, scorings=moved))):
                commit(rows)
                scored += len(rows)
                steps.advance()
                if failure := next((row for row in rows if row["reason"] is not None), None):
                    log.warning("sweep: %s: %s: %s", failure["slide_id"], failure["reason"], failure["message"])
    tables = {digest: store.read(digest) for digest in found.tables}
    return replace(found, tables=tables), scored


def _scored(config: Config, one: Reading) -> Iterator[list[Row]]:
    """The rows of each slide of a pass, as they come."""
    swept, cluster = _swept(config), config.cluster
    workers = cluster.most_workers if swept.workers is None else swept.workers
    if workers == 0:
        score = one.work.worker()
        for task in one.tasks:
            yield score(task)
        return
    room = Room(workers, cluster.cpus_per_worker, cluster.gpus_per_worker, cluster.start_timeout_s)
    above = swept.shard_above if workers > 1 else None
    make, run_pool = (
        replace(one.work, shard_above=above, shards=workers).worker,
        pooled if above is None else pooled_in_parts,
    )
    with connected(cluster):
        for place, rows in run_pool(make, one.tasks, room, "sweep"):
            yield _lost(one, one.tasks[place], rows) if isinstance(rows, StageError) else rows


def _lost(one: Reading, task: Task, error: StageError) -> list[Row]:
    return lost(task, [s for s in one.work.scorings if s.digest in task.wanted], str(error))


@contextmanager
def _committing(store: RowStore, lease: Lease) -> Iterator[Callable[[Sequence[Row]], None]]:
    """What takes rows, and commits them now and then, and at the end, also where the block is interrupted."""
    waiting: list[Row] = []
    last = time.monotonic()

    def flush() -> None:
        nonlocal last
        if waiting:
            lease.check()
            store.add(waiting)
            waiting.clear()
        last = time.monotonic()

    def commit(rows: Sequence[Row]) -> None:
        waiting.extend(rows)
        if len(waiting) >= _COMMIT_ROWS or time.monotonic() - last > _COMMIT_S:
            flush()

    try:
        yield commit
    finally:
        flush()
