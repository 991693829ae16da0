"""Sweeps: what four models cost together, and what many stored rows take: `python -m tests.bench.sweep`.

Times are of the CPU, of this process and its children, so that what else a machine does counts little.

- Four models x one cohort, read once, against one of them alone, and against four sweeps one after the other, of two
  stages of a ResNet-18 on 32 px. `network`: px as they are, so that the network takes most. `decode`: slides of one
  level, read at an eighth of their resolution, so that 64 px of JPEG are decoded for each px that the network sees. The
  goal, at most 1.6 times one alone, is for where decoding dominates; each case says what share its kinds of work have.
- 10,000 slides x 20 cells from rows to the report's page, below 60 s and 2 GiB; and what is to be scored when a model
  is added to them, below 10 s.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pipeline import telemetry
from pipeline.config.recipe import Config
from pipeline.schema import SWEEP_ROWS
from pipeline.sweep.page import sweep_page
from pipeline.sweep.rows import RowStore, done_sources
from pipeline.sweep.run import run
from pipeline.sweep.scoring import readings
from pipeline.sweep.statistics import cell_rows, cohort_result
from pipeline.sweep.tables import cells_table, pairs_table, predictions_table
from tests.pipeline.small import small_config
from tests.pipeline.sweep.made import made_cells, made_cohort
from tests.pipeline.sweep.small_sweep import sweep_config, write_model
from tests.synth import tissue_rgb, write_pyramid


def _spent() -> float:
    """CPU seconds of this process and its children: those that have ended, and those that live, as what tiles does."""
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    living = 0.0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            times = child.cpu_times()
            living += times.user + times.system
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime + living


def _cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a piece of work, its child processes' included, and what it gives."""
    began = _spent()
    found = work()
    return _spent() - began, found


def _config(folder: Path, root: str, models: list[str]) -> Config:
    config = sweep_config(folder, f"sqlite:///{folder}/mlflow.db", {name: str(folder / name) for name in models})
    return config.model_copy(update={"storage": config.storage.model_copy(update={"root": str(folder / root)})})


CASES: dict[str, tuple[int, float | None]] = {"network": (1, None), "decode": (3, 2.0)}
"""Name -> pictures across and down a slide, and microns per px of patches, of slides of 0.25; None: as the slides."""


_PICTURES = 4  # that are drawn: one takes longer than all that is measured of it


def together(folder: Path, slides: int, case: str) -> dict[str, float]:
    """Four models read once, one alone, and four one by one."""
    repeats, mpp = CASES[case]
    lines = ["slide_id,uri,label"]
    for number in range(slides):
        if number < _PICTURES:
            picture = np.tile(tissue_rgb(1601, 1201, seed=number), (repeats, repeats, 1))
            write_pyramid(folder / f"s{number}.tif", picture, levels=1, mpp=0.25)
        else:  # another file of the same content is another slide
            shutil.copy(folder / f"s{number % _PICTURES}.tif", folder / f"s{number}.tif")
        lines.append(f"s{number},s{number}.tif,{'yes' if number % 2 else 'no'}")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    names = ["a", "b", "c", "d"]
    for seed, name in enumerate(names):
        write_model(folder / name, seed, tiling={"patch_px": 32, "mpp": mpp, "min_tissue": 0.1, "edge": "drop"})
    run(_config(folder, "warm", ["a"]))
    telemetry.drain()
    alone, _ = _cpu(lambda: run(_config(folder, "one", ["a"])))
    kinds = telemetry.seconds(telemetry.drain())
    four, _ = _cpu(lambda: run(_config(folder, "four", names)))
    apart = sum(_cpu(partial(run, _config(folder, f"apart-{name}", [name])))[0] for name in names)
    return {
        "one_s": alone,
        "four_s": four,
        "apart_s": apart,
        "four_to_one": four / alone,
        "four_to_apart": four / apart,
        "shared_share": (4 * alone - four) / 3 / alone,
        **{f"one_{kind}_s": value for kind, value in kinds.items()},
    }


def stored(slides: int, models: int) -> dict[str, float]:
    """From rows to the page, and what an added model needs."""
    cohort = made_cohort(slides)
    cells = made_cells(cohort, [f"m{number}" for number in range(models)])
    y = np.array([slide.labels["tumour"] == "yes" for slide in cohort.slides])
    with tempfile.TemporaryDirectory() as folder:
        store = RowStore(folder)
        for seed, cell in enumerate(cells):
            positive = 1 / (1 + np.exp(-(2 * y - 1 + np.random.default_rng(seed).normal(0, 1 + seed / 20, slides))))
            store.add(_rows(cell.scoring.digest, cohort.sources, positive))

        def report() -> int:
            tables = {cell.scoring.digest: store.read(cell.scoring.digest) for cell in cells}
            rows = [cell_rows(cell, tables[cell.scoring.digest]) for cell in cells]
            seen = dict.fromkeys((cell.scoring.model.digest for cell in cells), 0)
            result = cohort_result(cohort, rows, resamples=2000, seed=0, few=10, seen=seen)
            config = small_config(sweep={"models": {"m": "last"}, "cohorts": {"all": "c"}})
            tabled = [len(table) for table in (cells_table([result]), pairs_table([result]), predictions_table(rows))]
            return len(sweep_page(config, [result], {}, [], {})) + sum(tabled)

        began = time.perf_counter()
        spent, _ = _cpu(report)
        wall = time.perf_counter() - began
        more = [*cells, *made_cells(cohort, ["new"])]

        def plan() -> int:
            done = {cell.scoring.digest: done_sources(store.read(cell.scoring.digest)) for cell in more}
            return sum(len(one.tasks) for one in readings(more, done, 4.0, None))

        planned, new = _cpu(plan)
    assert new == slides
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"report_cpu_s": spent, "report_wall_s": wall, "plan_cpu_s": planned, "peak_gib": peak}


def _rows(scoring: str, sources: tuple[str, ...], positive: np.ndarray) -> list[dict[str, Any]]:
    plain = {field.name: None if field.nullable else 0 for field in SWEEP_ROWS}
    return [
        {**plain, "scoring": scoring, "source": source, "slide_id": source, "precision": "float32", "device": "CPU"}
        | {"outputs": [1 - p, p], "patches_total": 900, "seconds": 0.5}
        for source, p in zip(sources, positive.tolist(), strict=True)
    ]


def main() -> int:
    """Print the figures as JSON; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=8)
    parser.add_argument("--stored", type=int, default=10_000)
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--only", choices=(*CASES, "stored"))
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    if options.only in (None, "stored"):
        found["stored"] = stored(options.stored, options.cells)
    for case in CASES:
        if options.only in (None, case):
            with tempfile.TemporaryDirectory() as folder:
                found[case] = together(Path(folder), options.slides, case)
    print(
        json.dumps(
            {name: {key: round(value, 3) for key, value in part.items()} for name, part in found.items()}, indent=2
        )
    )
    good = found.get("decode", {}).get("four_to_one", 0.0) <= 1.6
    rows = found.get("stored", {})
    good &= rows.get("report_wall_s", 0.0) < 60 and rows.get("peak_gib", 0.0) < 2 and rows.get("plan_cpu_s", 0.0) < 10
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
