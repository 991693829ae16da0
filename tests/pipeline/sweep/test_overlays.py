"""Heatmaps of slides of a cell, kept once they are drawn."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from pipeline.sweep import overlays
from pipeline.sweep.cells import expand
from pipeline.sweep.cohorts import read_cohorts
from pipeline.sweep.models import keep, resolve_models
from pipeline.sweep.overlays import draw_overlays
from tests.pipeline.sweep.small_sweep import SLIDES, sweep_config, write_cohort, write_model


def test_slides_are_drawn_once_and_those_that_are_gone_are_left_out(
    tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cohort(tmp_path)
    config = sweep_config(tmp_path, mlflow_uri, {"one": str(write_model(tmp_path / "one", 3))})
    (tmp_path / "scratch").mkdir()
    models, _ = resolve_models(config, tmp_path / "scratch")
    assert config.sweep is not None
    (cell,) = expand(models, read_cohorts(config, models[0]), config.sweep.grid).cells
    root = str(tmp_path / "sweeps")
    keep(models[0], root)
    drawn = draw_overlays(config, cell, [0, 4, SLIDES - 1], root)
    assert sorted(drawn) == [0, 4]
    assert Image.open(io.BytesIO(drawn[0])).width > 500
    assert drawn[0] != drawn[4]
    monkeypatch.setattr(overlays, "draw_slides", lambda *_: pytest.fail("drawn again"))
    assert draw_overlays(config, cell, [4, 0], root) == drawn
