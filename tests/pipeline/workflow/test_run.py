from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.csv as pa_csv
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from pipeline.cohort.recorded import read_recorded, record
from pipeline.cohort.table import CohortSlide, read_cohort
from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError, DataBudgetError, StageError
from pipeline.inference.prediction import load_model, predict_slide
from pipeline.ingest.tiler import store_slide
from pipeline.logs import context
from pipeline.storage.lease import held
from pipeline.tracking.tracker import open_tracking
from pipeline.workflow.run import load_cohort, plan, run
from tests.pipeline.small import small_config
from tests.pipeline.tiled import contents, what_is_stored
from tests.synth import tissue_rgb, write_pyramid

pytestmark = pytest.mark.ray


def _config(folder: Path, *overrides: str) -> Config:
    base = [
        f"cohort.uri={folder / 'cohort.csv'}",
        f"storage.root={folder / 'root'}",
        "tiling=image",
        "tiling.patch_px=64",
    ]
    return load_config("default", [*base, *overrides])


def _cohort(folder: Path, names: list[str], *, parted: bool = False) -> None:
    """Plain images as a cohort; names that start with `bad` are no images. `parted`: with splits of both labels."""
    for number, name in enumerate(names):
        path = folder / f"{name}.png"
        if name.startswith("bad"):
            path.write_bytes(b"not an image")
        elif not path.exists():
            Image.fromarray(tissue_rgb(211, 157, seed=number)).save(path)
    splits = ["train", "train", "test", "test", "val", "val"] * len(names) if parted else [""] * len(names)
    lines = [f"{name},{name}.png,{n % 2},{split}" for n, (name, split) in enumerate(zip(names, splits, strict=False))]
    (folder / "cohort.csv").write_text("\n".join(["slide_id,uri,label,split", *lines]) + "\n")


def test_tiling_runs_once_then_only_for_what_changed(ray_session: None, tmp_path: Path) -> None:
    _cohort(tmp_path, ["a", "b c", "ü"])
    config = _config(tmp_path)
    assert [(p.stage, p.action, p.why) for p in plan(config, "tile")] == [("tile", "run", "never done before")]

    first = run(config, "tile")
    assert (first.outcome, first.stages["tile"].outcome) == ("done", "done")
    assert first.stages["tile"].record.metrics == {"slides": 3, "slides_quarantined": 0, "patches": 36, "bad_tiles": 0}
    assert config.tracking.uri is not None
    client = MlflowClient(config.tracking.uri)
    child = client.get_run(str(first.stages["tile"].record.run_id))
    assert child.data.tags["mlflow.parentRunId"] == first.parent_run_id
    parent = client.get_run(str(first.parent_run_id)).data
    assert parent.metrics == first.stages["tile"].record.metrics
    assert parent.params["tiling.patch_px"] == "64"
    assert child.data.tags["cohort_digest"]
    assert child.data.metrics["patches"] == 36
    work = first.stages["tile"].record.facts["work"]  # of the processes that read the slides, by way of Ray's tasks
    assert {"decode", "encode", "write"} <= set(work)
    assert all(child.data.metrics[f"{kind}_s"] == seconds for kind, seconds in work.items())
    assert context() == {"run": first.parent_run_id}  # what its lines are about; the stage is over
    assert {item.path for item in client.list_artifacts(child.info.run_id)} == {"slides.csv", "quality.html"}
    assert {client.get_run(str(first.parent_run_id)).info.status, child.info.status} == {"FINISHED"}

    again = run(config, "tile")
    assert (again.outcome, again.stages["tile"].outcome, again.parent_run_id) == ("nothing to do", "skipped", None)
    assert context() == {}
    assert [p.action for p in plan(config, "tile")] == ["skip"]

    _cohort(tmp_path, ["a", "b c", "ü", "new"])
    assert [p.why for p in plan(config, "tile")] == ["changed since the last time: slides (1 added: new)"]
    store = Path(str(config.storage.patches))
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.arrow")}
    assert run(config, "tile").stages["tile"].record.metrics["slides"] == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before

    for pack in store.rglob("pack-*.arrow"):
        pack.unlink()
    assert [p.why.partition(":")[0] for p in plan(config, "tile")] == ["4 slides are gone from the store"]
    assert run(config, "tile").stages["tile"].outcome == "done"
    assert len(what_is_stored(store)) == 4 + 1

    shutil.rmtree(store)
    assert plan(config, "tile")[0].action == "run"
    assert run(config, "tile").stages["tile"].outcome == "done"
    assert len(what_is_stored(store)) == 4 + 1


@pytest.mark.parametrize(("field", "overrides"), [
    ("model.encoder", ["model.encoder.weights=net.pth"]),
    ("embed.encoder", [
        "model=features", "model.encoder.features=2048", "embed.encoder.name=resnet50", "train.augment=false",
        "embed.encoder.weights=net.pth",
    ]),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused_before_anything_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, overrides: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _cohort(tmp_path, [f"s{number}" for number in range(12)], parted=True)
    torch.save(torch.nn.Linear(2, 3), "net.pth")
    with pytest.raises(ConfigError) as caught:
        run(_config(tmp_path, *overrides))
    (problem,) = caught.value.problems
    assert problem == (
        f"{field}.weights: {tmp_path}/net.pth: weights: neither a safetensors file nor a .pth file of tensors only: it "
        "holds torch.nn.modules.linear.Linear, which is no tensor and was not run; save them with safetensors, or as "
        "torch.save(model.state_dict(), FILE)"
    )
    assert not (tmp_path / "root").exists()


def test_a_second_run_at_the_same_time_touches_nothing_of_the_first(tmp_path: Path) -> None:
    """Nor its MLflow run, which a run after a kill would end."""
    _cohort(tmp_path, ["a", "b", "c", "d", "e", "f"], parted=True)
    config = _config(tmp_path)
    run(config, "tile")
    before = contents(tmp_path / "root")
    _, train = plan(config, "train")
    lease = tmp_path / "root" / "stages" / f"train-{train.fingerprint}.lease"
    with (
        held(str(lease), "the first"),
        pytest.raises(StageError, match=r"train of default: process \d+ on .*, since .*, is at work on it"),
    ):
        run(config, "train")
    lease.unlink()
    assert contents(tmp_path / "root") == before


@pytest.mark.parametrize("others", ["alive", "killed"])
def test_tiling_goes_on_beside_another_run_and_leaves_its_mlflow_run_alone(
    ray_session: None, tmp_path: Path, others: str
) -> None:
    _cohort(tmp_path, ["a", "b"])
    config = _config(tmp_path)
    (tile,) = plan(config, "tile")
    lease = tmp_path / "root" / "stages" / f"tile-{tile.fingerprint}.lease"
    assert config.tracking.uri is not None
    tracker = open_tracking(config.tracking.uri, "default", str(tmp_path / "artifacts"))
    tags = {"stage": "tile", "fingerprint": str(tile.fingerprint), "root": config.storage.root}
    theirs = tracker.start_run("tile", None, tags)
    elsewhere = tracker.start_run("tile", None, {**tags, "root": "s3://another/root"})  # under another lease
    with held(str(lease), "the first") as held_by_first:
        if others == "killed":
            claim = json.loads(lease.read_text())
            lease.write_text(json.dumps({**claim, "started": 1e9}))  # the process of that id is another one
        done = run(config, "tile")
        assert done.outcome == "done"
        if others == "alive":
            held_by_first.check()
    status = tracker.client.get_run(theirs).info.status
    assert status == ("RUNNING" if others == "alive" else "KILLED")
    assert tracker.client.get_run(elsewhere).info.status == "RUNNING"
    assert json.loads(lease.read_text())["free"]


@pytest.mark.slow
@pytest.mark.nightly
def test_two_jobs_that_tile_one_cohort_at_once_end_with_one_store(tmp_path: Path) -> None:
    _cohort(tmp_path, [f"s{number}" for number in range(24)])
    overrides = [f"cohort.uri={tmp_path / 'cohort.csv'}", f"storage.root={tmp_path / 'root'}", "tiling=image"]
    command = [sys.executable, "-m", "pipeline", "tile", *overrides, "tiling.patch_px=16", "--json"]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [job.communicate(timeout=150) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    config = _config(tmp_path, "tiling.patch_px=16")
    for slide in read_cohort(config.cohort.uri).slides:
        assert store_slide(slide, config.tiling, str(tmp_path / "undisturbed")).status == "committed"
    assert what_is_stored(Path(str(config.storage.patches))) == what_is_stored(tmp_path / "undisturbed")
    assert plan(config, "tile")[0].action == "skip"
    client = MlflowClient(str(config.tracking.uri))
    for answer, log in said:
        assert client.get_run(json.loads(answer)["stages"]["tile"]["run_id"]).info.status == "FINISHED", log


def test_too_many_bad_slides_end_with_the_good_ones_committed(ray_session: None, tmp_path: Path) -> None:
    _cohort(tmp_path, ["a", "bad1", "b", "bad2"])
    config = _config(tmp_path)
    with pytest.raises(DataBudgetError, match=r"(?s)2 of 4 slides.*bad1.*bad2.*tiling.max_bad_slides=2") as caught:
        run(config, "tile")
    assert caught.value.exit_code == 3
    (page,) = (tmp_path / "root" / "reports").glob("default-tile-*/quality.html")  # to see what is wrong
    assert "not-a-slide: 2" in page.read_text()
    store = Path(str(config.storage.patches))
    assert len(what_is_stored(store)) == 2 + 1
    client = MlflowClient(str(config.tracking.uri))
    (experiment,) = client.search_experiments(filter_string="name = 'default'")
    assert {r.info.status for r in client.search_runs([experiment.experiment_id])} == {"FAILED"}

    lenient = run(_config(tmp_path, "tiling.max_bad_slides=2"), "tile")
    assert lenient.stages["tile"].record.metrics["slides_quarantined"] == 2
    ledger = Path(lenient.stages["tile"].record.outputs["ledger"]).read_text()
    assert ledger.count("quarantined") == 2
    assert json.loads(json.dumps(lenient.stages["tile"].record.metrics))["slides"] == 4


def test_a_run_goes_by_the_splits_that_were_recorded(tmp_path: Path) -> None:
    _cohort(tmp_path, [f"s{number:02d}" for number in range(30)])
    config = _config(tmp_path)
    drawn = load_cohort(config, needs_labels=True)
    assert not (tmp_path / "root").exists()  # looking records nothing
    others = _config(tmp_path, "seed=5", "cohort.split={train: 0.5, val: 0.1, test: 0.4}")
    assert load_cohort(others, needs_labels=True).slides != drawn.slides
    record(config.storage.root, drawn, config.cohort.split, config.seed, read_recorded(config.storage.root))
    _cohort(tmp_path, [f"s{number:02d}" for number in range(41)])
    for later in (config, others):
        assert load_cohort(later, needs_labels=True).slides[:30] == drawn.slides


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("source", ["store", pytest.param("stream", marks=pytest.mark.nightly)])
def test_patches_with_surroundings_go_the_whole_way(ray_session: None, tmp_path: Path, source: str) -> None:
    """From slides to a model whose test is what it says of each slide alone."""
    lines = ["slide_id,uri,split,label"]
    for number, split in enumerate(("train", "train", "train", "train", "test", "test")):
        write_pyramid(tmp_path / f"s{number}.tiff", tissue_rgb(211, 157, seed=number), tile=32)
        lines.append(f"s{number},s{number}.tiff,{split},{'yes' if number % 2 else 'no'}")
    (tmp_path / "cohort.csv").write_text("\n".join(lines) + "\n")
    config = small_config(
        cohort={"uri": str(tmp_path / "cohort.csv")},
        storage={"root": str(tmp_path / "root"), "patches": str(tmp_path / "root" / "patches")},
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "around"},
        tiling={"patch_px": 32, "tissue": "none", "context_mpp": 2.0, "cpus": 0.5},
        train={"source": source, "epochs": 2, "batch_size": 2, "warmup_epochs": 0, "shard_above": None},
        cluster={"cpus_per_worker": 1},
    )
    done = run(config, "evaluate").stages
    tested = pa_csv.read_csv(done["evaluate"].record.outputs["predictions"]).to_pydict()
    (weights,) = sorted((tmp_path / "root" / "train").rglob("weights.safetensors"))[-1:]
    model, own = load_model(weights.parent)
    assert model.dim == 2 * 128
    for slide_id, found in zip(tested["slide_id"], tested["tumour_yes"], strict=True):
        slide = CohortSlide(slide_id, str(tmp_path / f"{slide_id}.tiff"), slide_id, None, None, {}, {})
        assert predict_slide(model, own, slide).values["tumour"][1] == pytest.approx(found, abs=1e-5)
    assert run(config, "evaluate").outcome == "nothing to do"
