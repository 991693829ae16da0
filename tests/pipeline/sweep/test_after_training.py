"""A sweep over what a recipe has just trained and registered: it knows what it was trained on."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError, StageError
from pipeline.sweep.run import plan, run
from pipeline.workflow.run import run as run_workflow
from tests.pipeline.small import write_slide

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]  # a training, and six sweeps


def _config(folder: Path, *overrides: str) -> Config:
    base = [
        f"cohort.uri={folder}/cohort.csv", f"storage.root={folder}/root", "tiling=image", "tiling.patch_px=64",
        "model=resnet18_small", "model.select.memory=4", "train.epochs=1", "train.warmup_epochs=0", "name=small",
        "cluster.cpus_per_worker=1", "train.threads=1", "evaluate.bootstrap=50",
        "sweep.resamples=200", "sweep.few=2", "sweep.overlays=0", "sweep.workers=0",
    ]  # fmt: skip
    return load_config("default", [*base, *overrides])


def test_last_and_champion_are_one_model_that_knows_its_training_slides(ray_session: None, tmp_path: Path) -> None:
    splits = ["train"] * 4 + ["val"] * 4 + ["test"] * 5
    lines = ["slide_id,uri,split,label"]
    for number, split in enumerate(splits):
        write_slide(tmp_path / f"s{number}.png", number)
        lines.append(f"s{number},s{number}.png,{split},{number % 2}")
    (tmp_path / "cohort.csv").write_text("\n".join(lines) + "\n")
    on = "{own: {uri: %s/cohort.csv, split: %s}}"
    last = _config(tmp_path, "sweep.models={last: last}", f"sweep.cohorts={on % (tmp_path, 'test')}")
    with pytest.raises(StageError, match=r"the stage tile has to run first"):
        plan(last)
    run_workflow(last)
    result = run(last)
    (cell,) = pq.read_table(Path(result.report).parent / "cells.parquet").to_pylist()
    assert (cell["slides"], cell["seen_slides"]) == (5, 0)
    assert 0 < cell["threshold"] < 1
    assert {"sensitivity", "specificity"} <= cell.keys()

    for split, count in (("train", 4), ("val", 4)):
        seen = _config(tmp_path, "sweep.models={c: models:/small@champion}", f"sweep.cohorts={on % (tmp_path, split)}")
        with pytest.raises(ConfigError, match=f"c was trained or validated on {count} of its {count} slides"):
            run(seen)
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies" / "x.png").write_bytes((tmp_path / "s0.png").read_bytes())
    (tmp_path / "copies.csv").write_text("slide_id,uri,label\nx,copies/x.png,0\ns9,s9.png,1\n")
    champion = "sweep.models={c: models:/small@champion}"
    copied = _config(tmp_path, champion, f"sweep.cohorts={{c: {tmp_path}/copies.csv}}")
    with pytest.raises(ConfigError, match="trained or validated on 1 of its 2 slides, or on their patients: x"):
        run(copied)
    both = "sweep.models={last: last, champion: models:/small@champion}"
    with pytest.raises(ConfigError, match="are one model"):
        plan(_config(tmp_path, both, f"sweep.cohorts={on % (tmp_path, 'test')}"))
    alone = _config(tmp_path, "sweep.models={c: models:/small@champion}", f"sweep.cohorts={on % (tmp_path, 'test')}")
    assert [row["state"] for row in plan(alone)["cells"]] == ["done"]
