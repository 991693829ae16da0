"""Cross-validation: every patient is predicted by a training that knew neither him nor his label."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.cohort.table import CohortSlide, read_cohort
from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError
from pipeline.inference.ensemble import load_members, predict_mean
from pipeline.inference.prediction import load_model, predict_slide
from pipeline.model.folder import MEMBERS, WEIGHTS
from pipeline.sweep.folds import FoldsResult, fold_config, run_folds
from pipeline.tracking.registry import champion, fetch, find_version
from pipeline.tracking.tracker import connect
from pipeline.workflow.run import run
from tests.pipeline.small import write_slide

SITES = "aaaabbbbccccc"


def _config(folder: Path, root: str, *overrides: str) -> Config:
    base = [
        f"cohort.uri={folder}/cohort.csv", f"storage.root={folder}/{root}", "tiling=image", "tiling.patch_px=64",
        "model=resnet18_small", "model.select.memory=4", "train.epochs=2", "train.warmup_epochs=0", "name=small",
        "train.validate_every=1", "train.keep_best=true", "cluster.cpus_per_worker=1", "train.threads=1",
        "evaluate.bootstrap=50", f"storage.patches={folder}/patches", "train.folds=site",
    ]  # fmt: skip
    return load_config("default", [*base, *overrides])


def _cohort(folder: Path, flipped: str = "") -> None:
    """Labels in turns; those of one site are turned over."""
    lines = ["slide_id,uri,site,label"]
    for number, site in enumerate(SITES):
        path = folder / f"s{number}.png"
        if not path.exists():
            write_slide(path, number)
        lines.append(f"s{number},s{number}.png,{site},{(number + (site == flipped)) % 2}")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")


def test_without_folds_it_says_what_to_set(tmp_path: Path) -> None:
    _cohort(tmp_path)
    config = _config(tmp_path, "root", "train.folds=null")
    with pytest.raises(ConfigError, match="train.folds: is required"):
        run_folds(config)
    with pytest.raises(ConfigError, match="this command knows one training"):
        run(_config(tmp_path, "root"), "train")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(300)  # three trainings
def test_no_label_of_the_fold_that_is_reported_reaches_its_training(ray_session: None, tmp_path: Path) -> None:
    """Its labels are turned over: the training is the same to the last bit, with its best checkpoint and threshold."""

    def trained(root: str, flipped: str) -> tuple[str, dict[str, float], list[tuple[str, int, str]]]:
        _cohort(tmp_path, flipped)
        found = run(fold_config(_config(tmp_path, root), 1), "evaluate").stages
        record = found["train"].record
        weights = hashlib.sha256((Path(record.outputs["checkpoint"]) / WEIGHTS).read_bytes()).hexdigest()
        learned = {
            name: value for name, value in record.metrics.items() if name.startswith(("val_", "best_", "train_"))
        }
        with Path(found["evaluate"].record.outputs["predictions"]).open() as file:
            rows = [(row["slide_id"], int(row["label_label"]), row["label_1"]) for row in csv.DictReader(file)]
        return weights, learned, rows

    plain = trained("plain", "")
    leak = trained("leak", "b")
    assert leak[:2] == plain[:2]
    assert "val_threshold_label" in plain[1]
    assert [(name, 1 - label, score) for name, label, score in leak[2]] == plain[2]  # and the report saw it
    other = trained("other", "a")  # a site that trains or validates: the test above can fail
    assert other[1] != plain[1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)  # four trainings
@pytest.mark.nightly
def test_folds_side_by_side_are_those_of_one_after_the_other(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a kill between folds: the first one is done already, and the other two run at once."""
    _cohort(tmp_path)
    config = _config(tmp_path, "root")
    run(fold_config(config, 0), "evaluate")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "root" / "stages").glob("*.json")}
    with caplog.at_level("INFO", logger="pipeline"):
        result = run_folds(config)
    assert "folds: 2 of 2 at a time" in caplog.text
    assert "fold b: train: running" in caplog.text  # its process's own line
    assert {path: path.stat().st_mtime_ns for path in before} == before
    _check_table(config, result)
    alone = run(fold_config(_config(tmp_path, "alone", "cluster.trainings=1"), 1), "evaluate").stages
    assert _weights(alone["train"].record.outputs["checkpoint"]) == _weights(result.folds[1].checkpoint)
    assert dict(alone["evaluate"].record.metrics) == dict(result.folds[1].metrics)
    _check_ensemble(config, result, tmp_path)
    caplog.clear()
    again = run_folds(config)
    assert "at a time" not in caplog.text
    assert (again.outputs, again.versions, again.ensemble) == (result.outputs, result.versions, result.ensemble)


def _weights(checkpoint: str) -> bytes:
    return (Path(checkpoint) / WEIGHTS).read_bytes()


def _check_table(config: Config, result: FoldsResult) -> None:
    """Each slide is predicted by the fold that did not train on it, and all of them are measured together."""
    assert [fold.name for fold in result.folds] == ["a", "b", "c"]
    assert len({fold.checkpoint for fold in result.folds}) == 3
    table = pq.read_table(result.outputs["predictions.parquet"]).to_pydict()
    assert sorted(table["slide_id"]) == sorted(f"s{n}" for n in range(len(SITES)))
    assert [SITES[int(name[1:])] for name in table["slide_id"]] == table["fold"]
    labels = {slide.slide_id: slide.labels["label"] for slide in read_cohort(config.cohort.uri, config.tasks).slides}
    y = np.array([labels[name] == "1" for name in table["slide_id"]])
    pooled = result.measures["label"]["auc"]
    assert pooled.value == pytest.approx(roc_auc_score(y, table["label_1"]))
    assert pooled.low <= pooled.value <= pooled.high
    told = json.loads(Path(result.outputs["folds.json"]).read_text())
    assert told["measures"]["label"]["auc"]["value"] == pooled.value
    for fold in result.folds:
        own = [place for place, name in enumerate(table["fold"]) if name == fold.name]
        assert fold.metrics["test_auc"] == pytest.approx(roc_auc_score(y[own], np.array(table["label_1"])[own]))


def _check_ensemble(config: Config, result: FoldsResult, folder: Path) -> None:
    """A version for each fold, without an alias, and one whose answers are their mean."""
    store = connect(str(config.tracking.uri))
    assert result.versions == ("models:/small/1", "models:/small/2", "models:/small/3")
    assert champion(store, "small") is None
    assert [find_version(store, uri).tags["fold"] for uri in result.versions] == ["0", "1", "2"]
    version, files = fetch(store, result.ensemble, folder / "fetched")
    assert version.tags["members"] == ", ".join(result.versions)
    slide = CohortSlide("s0", str(folder / "s0.png"), "s0", None, None, {}, {})
    each = [predict_slide(*load_model(Path(fold.checkpoint)), slide).values["label"] for fold in result.folds]
    np.testing.assert_array_equal(predict_mean(load_members(files / MEMBERS), slide)["label"], np.mean(each, axis=0))
