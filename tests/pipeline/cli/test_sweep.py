"""`sweep` and `sweep plan`, as they are typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from tests.pipeline.sweep.small_sweep import SLIDES, write_cohort, write_model

CONF = Path(__file__).resolve().parents[3] / "conf"


@pytest.fixture
def typed(tmp_path: Path) -> list[str]:
    """Options and overrides of a sweep of two models."""
    write_cohort(tmp_path)
    for number, name in enumerate(("one", "two")):
        write_model(tmp_path / name, number)
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf" / "mine.yaml").write_text(
        f"""
defaults: [default, _self_]
name: mine
cohort: {{uri: {tmp_path}/cohort.csv}}
storage: {{root: {tmp_path}/root}}
sweep:
  models: {{one: {tmp_path}/one, two: {tmp_path}/two}}
  cohorts: {{all: {tmp_path}/cohort.csv}}
  workers: 0
  overlays: 1
"""
    )
    return ["--config", "mine", "--config-dir", str(tmp_path / "conf"), "--json", "sweep.resamples=200"]


@pytest.mark.slow
def test_plan_sweep_and_again(typed: list[str], tmp_path: Path) -> None:
    runner = CliRunner()
    planned = runner.invoke(app, ["sweep", "plan", *typed])
    assert planned.exit_code == 0, planned.output
    cells = json.loads(planned.stdout)["cells"]
    assert [(cell["model"], cell["state"], cell["to_score"]) for cell in cells] == [
        ("one", "new", SLIDES),
        ("two", "new", SLIDES),
    ]
    assert not (tmp_path / "root").exists()
    done = runner.invoke(app, ["sweep", *typed])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["outcome"], found["scored"]) == ("done", 2 * SLIDES)
    assert list(Path(found["report"]).parent.glob("overlays/*.png"))
    again = json.loads(runner.invoke(app, ["sweep", "run", *typed]).stdout)
    assert (again["outcome"], again["report"]) == ("nothing to do", found["report"])
    lost = runner.invoke(app, ["sweep", *typed, f"sweep.models.gone={tmp_path}/gone"])
    assert lost.exit_code == 3
    assert list(json.loads(lost.stdout)["failed"]) == ["gone"]


def test_a_config_without_a_sweep_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["sweep", "plan", f"cohort.uri={tmp_path}/c.csv", "--json"])
    assert result.exit_code == 2
    assert "sweep: is required" in result.output
