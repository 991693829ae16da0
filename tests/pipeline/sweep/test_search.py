"""Hyperparameters are chosen by validation alone, and only the chosen training is tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError
from pipeline.sweep.search import run_search, trial_configs
from tests.pipeline.small import write_slide


def _config(folder: Path, *overrides: str) -> Config:
    base = [
        f"cohort.uri={folder}/cohort.csv", f"storage.root={folder}/root", "tiling=image", "tiling.patch_px=64",
        "model=resnet18_small", "model.select.memory=4", "train.epochs=1", "train.warmup_epochs=0", "name=small",
        "cluster.cpus_per_worker=1", "train.threads=1", "evaluate.bootstrap=50",
    ]  # fmt: skip
    return load_config("default", [*base, *overrides])


def test_a_grid_and_runs_are_trainings_of_the_recipe(tmp_path: Path) -> None:
    config = _config(
        tmp_path, "sweep.train.grid={train.lr: [0.1, 0.2], model.select.memory: [3, 4]}", "sweep.train.runs=[{seed: 7}]"
    )
    trials = trial_configs(config)
    assert [dict(settings) for settings, _ in trials] == [
        {"train.lr": 0.1, "model.select.memory": 3},
        {"train.lr": 0.1, "model.select.memory": 4},
        {"train.lr": 0.2, "model.select.memory": 3},
        {"train.lr": 0.2, "model.select.memory": 4},
        {"seed": 7},
    ]
    assert [(own.train.lr, own.model.select.memory, own.seed) for _, own in trials][2:] == [
        (0.2, 3, 0), (0.2, 4, 0), (config.train.lr, 4, 7),
    ]  # fmt: skip
    assert all(own.storage == config.storage and own.tiling == config.tiling for _, own in trials)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("sweep.train.grid={train.lr: [0.1, -1]}", r'\{"train.lr": -1\}: train.lr: Input should be greater than 0'),
        ("sweep.train.grid={train.leraning: [1]}", "train.leraning: Extra inputs"),
        ("sweep.train.grid={model.select.memory: [4, 4]}", "are one training"),
        ("sweep.train.grid={train.grad_chunk: [9]}", "train.grad_chunk: has no effect"),
        ("sweep.models={a: last}", "sweep.train: is required"),
    ],
)
def test_what_makes_no_training_is_refused(tmp_path: Path, given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trial_configs(_config(tmp_path, given))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.nightly
def test_the_best_by_validation_alone_is_tested(ray_session: None, tmp_path: Path) -> None:
    lines = ["slide_id,uri,split,label"]
    for number, split in enumerate(["train"] * 4 + ["val"] * 4 + ["test"] * 5):
        write_slide(tmp_path / f"s{number}.png", number)
        lines.append(f"s{number},s{number}.png,{split},{number % 2}")
    (tmp_path / "cohort.csv").write_text("\n".join(lines) + "\n")
    config = _config(tmp_path, "sweep.train.grid={train.lr: [0.3, 0.0001]}")
    result = run_search(config)
    assert result.trials[result.chosen].score == max(trial.score for trial in result.trials)
    assert len({trial.checkpoint for trial in result.trials}) == 2
    stages = [path.name.partition("-")[0] for path in (tmp_path / "root" / "stages").glob("*.json")]
    assert sorted(stages) == ["evaluate", "tile", "train", "train"]
    assert "test_auc" in result.test
    assert json.loads(Path(result.outputs["search.json"]).read_text())["chosen"] == result.chosen
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "root" / "train").rglob("*") if path.is_file()}
    again = run_search(config)
    assert again == result
    assert {path: path.stat().st_mtime_ns for path in before} == before
