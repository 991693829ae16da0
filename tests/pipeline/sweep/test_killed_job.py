"""A sweep as a Ray job that is killed twice: 3 recipes x 2 cohorts x 3 settings, each slide scored once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config.compose import load_config
from pipeline.config.data import DemoConfig
from pipeline.config.recipe import Config
from pipeline.demo.cohort import write_demo
from pipeline.model.build import build_model
from pipeline.model.folder import save_model
from pipeline.sweep.rows import Row
from pipeline.sweep.run import run
from tests.pipeline.jobs.head import REPO, Head, serve_head

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(900)]

RECIPES = {
    "plain": [],
    "window": ["model.select.mode=window"],
    "coarse": ["tiling.mpp=4.0"],
}
SLIDES = 24


def _overrides(folder: Path, root: str) -> list[str]:
    models = ", ".join(f"{name}: {folder}/{name}" for name in RECIPES)
    cohorts = ", ".join(f"{name}: {folder}/{name}/cohort.csv" for name in ("north", "south"))
    return [
        "tiling=demo", "model=demo", "model.select.context=none", "name=killed",
        f"cohort.uri={folder}/north/cohort.csv",
        f"storage.root={folder}/{root}", "cluster.workers=2", "cluster.cpus_per_worker=1", "sweep.overlays=0",
        f"sweep.models={{{models}}}", f"sweep.cohorts={{{cohorts}}}", "sweep.grid.memory=[4,8,12]",
        "tasks.0.name=lesion", "sweep.resamples=200", f"tracking.uri=sqlite:///{folder}/{root}.db",
    ]  # fmt: skip


def _config(folder: Path, root: str, *more: str) -> Config:
    return load_config("default", [*_overrides(folder, root), *more])


def _prepare(folder: Path) -> None:
    """Two demo cohorts of other slides, and a network of random weights for each recipe."""
    for seed, name in enumerate(("north", "south")):
        write_demo(str(folder / name), DemoConfig(slides=SLIDES, seed=seed))
    for seed, (name, changes) in enumerate(RECIPES.items()):
        config = _config(folder, "root", *changes).model_copy(update={"sweep": None})
        (folder / name).mkdir()
        torch.manual_seed(seed)
        save_model(folder / name, build_model(config).state_dict(), config)


def _parts(root: Path) -> list[Path]:
    return sorted((root / "sweeps" / "rows").glob("*/*.parquet"))


def _rows(root: Path) -> list[Row]:
    """All that were ever committed: a slide that was scored twice stands there twice."""
    rows: list[Row] = pa.concat_tables([pq.read_table(part) for part in _parts(root)]).to_pylist()
    return rows


def _holder(root: Path, before: int | None) -> int:
    """The process that holds the sweep, once it is another one than before."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):
            claim = json.loads((root / "sweeps" / "sweep.lease").read_text())
            if not claim["free"] and claim["pid"] != before and psutil.pid_exists(claim["pid"]):
                return int(claim["pid"])
        time.sleep(0.1)
    raise AssertionError("no process holds the sweep")


def _submit(head: Head, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", "submit", "--working-dir", str(REPO / "conf"), "--json", "sweep"]
    command += ["run", "--json", *_overrides(folder, "root"), f"deploy.address={head.address}"]
    return subprocess.Popen(command, env=head.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_job_that_is_killed_twice_scores_each_slide_once(tmp_path: Path) -> None:
    _prepare(tmp_path)
    root = tmp_path / "root"
    with serve_head() as head:
        job = _submit(head, tmp_path)
        pid = _holder(root, None)
        while not _parts(root):  # some rows are there: the first pass is over, or 20 s have gone by
            assert job.poll() is None, job.communicate()
            time.sleep(0.1)
        kept = {path: path.stat().st_mtime_ns for path in _parts(root)}
        os.kill(pid, signal.SIGKILL)
        assert job.wait(120) != 0
        job.communicate()

        job = _submit(head, tmp_path)
        again = _holder(root, pid)
        os.kill(again, signal.SIGTERM)
        assert job.wait(120) != 0
        job.communicate()
        assert not list((root / "sweeps" / "reports").glob("*/report.json"))

        job = _submit(head, tmp_path)
        out, err = job.communicate(timeout=500)
        assert job.returncode == 0, err[-3000:]
    assert json.loads(out)["code"] == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    rows = _rows(root)
    assert set(Counter((row["scoring"], row["source"]) for row in rows).values()) == {1}
    (report,) = (root / "sweeps" / "reports").glob("*/report.json")
    cells = pq.read_table(report.parent / "cells.parquet").to_pylist()
    assert Counter((cell["model"], cell["cohort"]) for cell in cells) == {
        (model, cohort): 3 for model in RECIPES for cohort in ("north", "south")
    }
    assert {cell["slides"] for cell in cells} == {SLIDES}

    run(_config(tmp_path, "whole", "sweep.workers=0"))
    whole = {(row["scoring"], row["slide_id"], row["source"]): row["outputs"] for row in _rows(tmp_path / "whole")}
    assert len(whole) == len(rows) == 9 * 2 * SLIDES
    for row in rows:
        expected = whole[row["scoring"], row["slide_id"], row["source"]]
        np.testing.assert_allclose(row["outputs"], expected, rtol=1e-4)
