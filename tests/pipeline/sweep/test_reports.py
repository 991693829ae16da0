"""A report stands until what it says changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import StageError
from pipeline.inference.resampling import read_plan
from pipeline.storage.lease import held
from pipeline.sweep.cells import Expansion
from pipeline.sweep.reports import Swept, write_report
from tests.pipeline.sweep.made import made_cells, made_cohort, made_table
from tests.pipeline.sweep.small_sweep import sweep_config


def _swept(tmp_path: Path, mlflow_uri: str, failed: tuple[int, ...] = ()) -> Swept:
    cohort = made_cohort(31)
    cells = made_cells(cohort, ["a", "b"])
    config = sweep_config(tmp_path, mlflow_uri, {"a": "last", "b": "last"})
    tables = {cell.scoring.digest: made_table(cell, 0.5, seed, failed) for seed, cell in enumerate(cells)}
    return Swept(config, Expansion(tuple(cells), ()), (cohort,), tables, {})


def test_a_report_is_written_once(tmp_path: Path, mlflow_uri: str) -> None:
    root = str(tmp_path / "sweeps")
    with held(f"{root}/sweep.lease", "test") as lease:
        swept = _swept(tmp_path, mlflow_uri)
        page, run_id = write_report(swept, root, lease)
        assert run_id is not None
        assert write_report(swept, root, lease) == (page, None)
        other, _ = write_report(_swept(tmp_path, mlflow_uri, failed=(3,)), root, lease)
        assert other != page
    kinds = Counter(path.suffix for path in Path(page).parent.iterdir())
    assert kinds == {".parquet": 6, ".csv": 5, ".html": 1, ".json": 1}
    plan = read_plan(pq.read_table(Path(page).parent / "resamples-all.parquet"))
    assert plan.counts.shape == (200, 16)


def test_the_fingerprint_is_of_what_is_said(tmp_path: Path, mlflow_uri: str) -> None:
    swept = _swept(tmp_path, mlflow_uri)
    assert swept.config.sweep is not None
    quick = swept.config.sweep.model_copy(update={"workers": 3, "models_gib": 1.0})
    faster = replace(swept, config=swept.config.model_copy(update={"sweep": quick}))
    assert faster.fingerprint == swept.fingerprint
    more = swept.config.sweep.model_copy(update={"resamples": 300})
    others = [
        replace(swept, config=swept.config.model_copy(update={"sweep": more})),
        replace(swept, failed={"c": "gone"}),
        _swept(tmp_path, mlflow_uri, failed=(0,)),
    ]
    assert len({swept.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_nothing_predicted_is_no_report(tmp_path: Path, mlflow_uri: str) -> None:
    root = str(tmp_path / "sweeps")
    with held(f"{root}/sweep.lease", "test") as lease, pytest.raises(StageError, match=r"no slide could be .* \(odd\)"):
        write_report(_swept(tmp_path, mlflow_uri, failed=tuple(range(31))), root, lease)
