from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from tests.pipeline.small import small_config, write_model, write_slide


def test_options_reach_the_batch_and_some_slides_without_prediction_are_exit_3(tmp_path: Path) -> None:
    write_slide(tmp_path / "good.png", 3)
    model = ["predict", "--model", str(write_model(tmp_path, small_config())), "--out", str(tmp_path / "out")]
    slides = [str(tmp_path / name) for name in ("good.png", "absent.png")]
    result = CliRunner().invoke(app, [*model, *slides, "--heads", "--all-patches", "--json"])
    assert result.exit_code == 3, result.output
    assert json.loads(result.stdout)["predicted_now"] == 1
    found = {path.name for path in (tmp_path / "out" / "slides" / "good").iterdir()}
    assert {"all.geojson.gz", "overlay.png"} <= found
    again = CliRunner().invoke(app, [*model, slides[0], "--heads", "--all-patches"])
    assert again.exit_code == 0
    assert again.stdout.strip().endswith("summary.html")
    assert CliRunner().invoke(app, [*model, slides[1]]).exit_code == 1


@pytest.mark.parametrize("wrong", [["--workers", "-1"], ["--cpus-per-worker", "0"], ["--out", "gs://bucket/out"]])
def test_what_makes_no_sense_is_refused(tmp_path: Path, wrong: list[str]) -> None:
    model = str(write_model(tmp_path, small_config()))
    assert CliRunner().invoke(app, ["predict", "--model", model, "a.png", *wrong]).exit_code in (1, 2)
