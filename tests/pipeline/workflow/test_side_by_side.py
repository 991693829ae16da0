"""Runs in processes of their own; that they give what they give alone is seen on folds (`tests.pipeline.sweep`)."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.errors import PipelineError
from pipeline.workflow.side_by_side import Asked, run_all
from tests.pipeline.small import write_slide

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def _config(folder: Path, root: str, *overrides: str) -> Config:
    base = [
        f"cohort.uri={folder}/cohort.csv", f"storage.root={folder}/{root}", "tiling=image", "tiling.patch_px=64",
        "name=small", "cluster.cpus_per_worker=1", f"storage.patches={folder}/{root}/patches",
    ]  # fmt: skip
    return load_config("default", [*base, *overrides])


def test_each_runs_once_and_says_so_here_and_a_failure_comes_back_as_itself(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        write_slide(tmp_path / f"s{number}.png", number)
    rows = [f"s{n},s{n}.png,{n % 2}" for n in range(3)]
    (tmp_path / "cohort.csv").write_text("\n".join(["slide_id,uri,label", *rows]) + "\n")
    asked = [Asked(name, _config(tmp_path, name)) for name in ("a", "b")]
    with caplog.at_level(logging.INFO, logger="pipeline"):
        found = run_all(asked, "tile", "tilings")
    assert "tilings: 2 of 2 at a time" in caplog.text
    for name in ("a", "b"):
        assert f"{name}: tile: running, never done before" in caplog.text
    assert [records["tile"].keys.keys() for records in found] == [{"s0", "s1", "s2"}] * 2
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="pipeline"):
        again = run_all(asked, "tile", "tilings")
    assert "at a time" not in caplog.text
    assert [records["tile"].outputs for records in again] == [records["tile"].outputs for records in found]
    (tmp_path / "s1.png").unlink()
    strict = [Asked(name, _config(tmp_path, name, "tiling.max_bad_slides=0")) for name in ("a", "b")]
    with pytest.raises(PipelineError, match="s1"):
        run_all(strict, "tile", "tilings")
