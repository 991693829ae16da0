"""What the release before the catalogue wrote is opened by this one: its stores, records, checkpoint and model.

`released.tar.xz` was made by that release, of four slides on stored features, trained for two steps; kept of it are two
slides' patches and features. It is never written anew: a change that cannot read it has to say so in CHANGELOG.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.csv as pv
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipeline.bags.sources import open_bag, open_sources
from pipeline.cli.main import app
from pipeline.cohort.table import read_cohort
from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.inference.prediction import load_model, predict_bag
from pipeline.ingest.tiler import store_slide
from pipeline.model.build import build_model, build_optimizer
from pipeline.storage import files
from pipeline.store.verify import verify_store
from pipeline.training.saver import newest, restore
from pipeline.workflow.run import plan
from pipeline.workflow.stage import Record

_ARCHIVE = Path(__file__).with_name("released.tar.xz")
_SHA256 = "f4e6c1b6307e073097f545bfc9f503a9f0bb9000d6cd7f91c79e79716e9bfa31"
_MADE_IN = "/tmp/released"
_KEPT = ("a", "d")


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """The folder of that release as if it had been made here: paths and times of files are as its records say."""
    assert hashlib.sha256(_ARCHIVE.read_bytes()).hexdigest() == _SHA256
    with tarfile.open(_ARCHIVE) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 has it, Debian's 3.11.2 not
        archive.extractall(tmp_path)
    named = ["cohort.csv", "config.json", "patches/*/sources/*.json", "run/stages/*.json"]
    for path in (found for pattern in named for found in tmp_path.glob(pattern)):
        path.write_text(path.read_text().replace(_MADE_IN, str(tmp_path)))
    for path in tmp_path.glob("patches/*/sources/*.json"):
        record = json.loads(path.read_text())
        os.utime(record["source"]["uri"], (record["version"]["mtime"],) * 2)
    (path,) = tmp_path.glob("run/stages/tile-*.json")
    tile = json.loads(path.read_text())
    tile["facts"]["identity"]["store"] = fingerprint(tile["outputs"]["store"])
    path.write_text(json.dumps(tile))
    return tmp_path


def _config(released: Path) -> Config:
    return Config.model_validate_json((released / "config.json").read_text())


def _record(released: Path, stage: str) -> Record:
    (path,) = released.glob(f"run/stages/{stage}-*.json")
    return Record(**files.read_json(str(path)))


def _stored(released: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for top in ("patches", "features") for path in released.glob(f"{top}/*/*/*.*")}


@pytest.mark.parametrize("migrated", [True, False])
def test_stores_are_taken_over_and_no_slide_is_tiled_again(released: Path, migrated: bool) -> None:  # noqa: FBT001
    config, keys = _config(released), _record(released, "tile").keys
    before = {path: data for path, data in _stored(released).items() if path.parent.name != "sources"}
    assert {path.parent.name for path in before} == {keys[name] for name in _KEPT}
    for top, sources in (("patches", 2), ("features", 0)) if migrated else ():
        done = CliRunner().invoke(app, ["store", "migrate", str(released / top)])
        assert done.exit_code == 0, done.output
        assert f"1 catalogues: 2 slides added or corrected, 0 that are gone taken out, {sources} rec" in done.output
        report = verify_store(str(released / top), 1, lambda done, total: None)
        assert report.damage == report.leftovers == []
    for slide in read_cohort(str(released / "cohort.csv")).slides:
        if slide.slide_id in _KEPT:
            status = store_slide(slide, config.tiling, str(released / "patches"))
            assert (status.status, status.key, status.n_patches) == ("committed", keys[slide.slide_id], 20)
    after = _stored(released)
    assert {path: after[path] for path in before} == before


def test_records_are_read_and_the_plan_says_what_runs_anew(released: Path) -> None:
    config, cohort = _config(released), released / "cohort.csv"
    first = plan(config)[0]
    otherwise = "identified otherwise by the release that did it last"
    assert (first.stage, first.action, first.why) == ("tile", "run", otherwise)
    header, *rows = cohort.read_text().splitlines()
    cohort.write_text("\n".join([header, *rows[1:], rows[0].replace("a", "e", 1)]) + "\n")
    shutil.copy(released / "slides" / "a.png", released / "slides" / "e.png")
    assert plan(config)[0].why == f"{otherwise}; changed since the last time: slides (1 added: e; 1 removed)"
    for stage in ("tile", "embed", "train", "evaluate", "register"):
        assert _record(released, stage).stage == stage
    assert _record(released, "train").facts["identity"]["recipe"] == fingerprint(config.recipe())


def test_training_goes_on_from_its_checkpoint(released: Path) -> None:
    (run,) = released.glob("run/train/*")
    progress = newest(str(run), read=True)
    assert progress is not None
    assert (progress.name, progress.epoch) == ("step-00000002", 2)
    config = _config(released)
    model = build_model(config)
    optimizer = build_optimizer(model, config.train)
    assert restore(str(run), progress.name, model, optimizer, progress.plan_digest).step == progress.step == 2
    weights = load_file(run / progress.name / "weights.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_a_registered_model_predicts_what_it_did(released: Path) -> None:
    model, config = load_model(released / "model" / "artifacts")
    here = _config(released)
    config = config.model_copy(update={"storage": here.storage, "cohort": here.cohort})
    for top in ("patches", "features"):
        assert CliRunner().invoke(app, ["store", "migrate", str(released / top)]).exit_code == 0
    (slide,) = (one for one in read_cohort(here.cohort.uri or "").slides if one.slide_id == "d")
    ((_, source),) = open_sources(config, [slide], _record(released, "tile").keys)
    found = predict_bag(model.eval(), open_bag(source, threads=1, augment=None), config).values["tumour"]
    (told,) = (row for row in pv.read_csv(released / "run" / "predictions.csv").to_pylist() if row["slide_id"] == "d")
    np.testing.assert_allclose(found, [told["tumour_no"], told["tumour_yes"]], rtol=1e-5)
