from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from pyarrow.parquet import read_table

from pipeline.bags.embed import shared_embedder
from pipeline.cohort.table import CohortSlide
from pipeline.config.embed import EmbedConfig
from pipeline.config.recipe import Config
from pipeline.errors import StageError, StorageError, TrackingError
from pipeline.inference.prediction import load_model, predict_slide
from pipeline.model.build import build_encoder
from pipeline.predictions.run import predict
from pipeline.tracking.registry import (
    RegisteredVersion,
    add_file,
    fetch,
    find_version,
    promote,
    register_model,
)
from pipeline.tracking.tracker import Tracker, connect, open_tracking
from tests.pipeline.small import small_config, write_model, write_slide
from tests.processes import serve_mlflow

# MLflow 3.17 on SQLAlchemy 2.1 and pandas 3
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning", "ignore:Operation with range:DeprecationWarning"
)


@pytest.fixture(scope="module")
def tracker(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return open_tracking(mlflow_uri, "registry", str(tmp_path_factory.mktemp("artifacts")))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), small_config())


def _register(tracker: Tracker, name: str, folder: Path) -> RegisteredVersion:
    with tracker.run("register") as run_id:
        return register_model(
            tracker, name, folder, run_id,
            tags={"cohort_digest": "c0ffee"}, metrics={"test_auc": 0.75}, example_uri="/slides/a.svs",
        )  # fmt: skip


@pytest.fixture(scope="module")
def registered(tracker: Tracker, model_folder: Path) -> RegisteredVersion:
    return _register(tracker, "small", model_folder)


def test_a_version_carries_lineage_metrics_and_run(tracker: Tracker, registered: RegisteredVersion) -> None:
    entry = tracker.client.get_model_version("small", registered.version)
    assert entry.tags["cohort_digest"] == "c0ffee"
    assert entry.run_id == registered.run_id
    model_id = entry.source.removeprefix("models:/")
    logged = tracker.client.get_logged_model(model_id)
    assert logged.status == "READY"
    assert {metric.key: metric.value for metric in logged.metrics} == {"test_auc": 0.75}
    run = tracker.client.get_run(registered.run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [model_id]
    assert run.data.metrics["test_auc"] == 0.75


def test_fetch_brings_back_the_same_weights(
    tracker: Tracker, registered: RegisteredVersion, model_folder: Path, tmp_path: Path
) -> None:
    version, folder = fetch(tracker, registered.uri, tmp_path)
    assert version == registered
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "weights.safetensors"]
    ours, config = load_model(folder)
    theirs, _ = load_model(model_folder)
    assert config == small_config()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)


def test_a_file_is_put_beside_the_weights_but_not_beside_those_of_a_copy(
    tracker: Tracker, registered: RegisteredVersion, tmp_path: Path
) -> None:
    for text in ("first", "second"):
        (tmp_path / "told.json").write_text(text)
        add_file(tracker, registered, tmp_path / "told.json")
        _, folder = fetch(tracker, registered.uri, tmp_path / text)
        assert (folder / "told.json").read_text() == text
        assert (folder / "weights.safetensors").is_file()
    mlflow.set_tracking_uri(tracker.uri)
    made = tracker.client.copy_model_version(f"models:/{registered.name}/{registered.version}", "copies")
    copied = find_version(tracker, f"models:/copies/{made.version}")
    with pytest.raises(TrackingError, match=rf"models:/copies/1: its files belong to models:/{registered.name}/1"):
        add_file(tracker, copied, tmp_path / "told.json")


def test_aliases_move_and_the_former_champion_stays_reachable(tracker: Tracker, model_folder: Path) -> None:
    first, second = (_register(tracker, "moving", model_folder) for _ in range(2))
    assert promote(tracker, "moving", first.version) is None
    assert promote(tracker, "moving", first.version) == first.version
    with pytest.raises(TrackingError, match="previous"):
        find_version(tracker, "models:/moving@previous")
    assert promote(tracker, "moving", second.version) == first.version
    assert find_version(tracker, "models:/moving@champion") == second
    assert find_version(tracker, "models:/moving@previous") == first


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/absent@champion", r"no model 'absent', only \[.*'small'"),
        ("models:/small@champion", r"has versions \[1\] and aliases \{\}"),
        ("models:/small/7", r"has versions \[1\]"),
        ("models:/small", "models:/NAME@ALIAS"),
        ("small", "models:/NAME@ALIAS"),
    ],
)
def test_what_is_absent_is_named_with_what_there_is(
    tracker: Tracker, registered: RegisteredVersion, uri: str, message: str
) -> None:
    with pytest.raises(TrackingError, match=message):
        find_version(tracker, uri)


@pytest.mark.parametrize("broken", ["files", "registry"])
def test_a_registration_that_fails_leaves_nothing_pending_and_names_what_failed(
    broken: str, model_folder: Path, mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    own = open_tracking(mlflow_uri, tmp_path.name, str(place))
    if broken == "files":
        place.write_text("no folder")
        said = r"files cannot be written to file://.*/place/.*\n.*has room"
    else:
        monkeypatch.setattr(type(own.client), "create_model_version", _refuse)
        said = r"no more versions\n.*mlflow db upgrade"
    with pytest.raises(TrackingError, match=said):
        _register(own, tmp_path.name, model_folder)
    (model,) = own.client.search_logged_models([own.experiment_id])
    assert str(model.status) == "FAILED"


def _refuse(*_: object, **__: object) -> None:
    raise MlflowException("no more versions")


def test_files_that_cannot_be_read_are_not_blamed_on_the_database(
    model_folder: Path, mlflow_uri: str, tmp_path: Path
) -> None:
    own = open_tracking(mlflow_uri, tmp_path.name, str(tmp_path / "place"))
    version = _register(own, tmp_path.name, model_folder)
    (config,) = (tmp_path / "place").rglob("artifacts/config.json")
    config.unlink()
    config.symlink_to("nothing")
    with pytest.raises(TrackingError, match=r"files cannot be read from .*/place/(.|\n)*AWS_\*") as caught:
        fetch(connect(mlflow_uri), version.uri, tmp_path / "fetched")
    assert "db upgrade" not in str(caught.value)


def test_a_model_outlives_its_experiment(model_folder: Path, tmp_path: Path) -> None:
    own = open_tracking(f"sqlite:///{tmp_path}/mlflow.db", "trained", str(tmp_path / "place"))
    version = _register(own, "kept", model_folder)
    for experiment in own.client.search_experiments():
        own.client.delete_experiment(experiment.experiment_id)
    write_slide(tmp_path / "s.png", 5)
    slides = [str(tmp_path / "s.png")]
    said = predict(version.uri, slides, None, tmp_path / "out", tracking_uri=own.uri)
    assert said["failed"] == {}


def test_a_folder_without_a_model_is_refused(tracker: Tracker, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"config\.json"):
        _register(tracker, "none", tmp_path)


def test_the_signature_and_the_requirements_are_what_a_host_can_install(
    tracker: Tracker, registered: RegisteredVersion, tmp_path: Path
) -> None:
    source = tracker.client.get_model_version_download_uri("small", registered.version)
    local = Path(download_artifacts(source, dst_path=str(tmp_path)))
    model = Model.load(str(local))
    assert model.signature is not None
    assert [spec.name for spec in model.signature.inputs.inputs] == ["uri", "mpp", "series"]
    asked_for = ["patch", "patches", "top", "curves"]
    ends = ["tumour_no_low", "tumour_no_high", "tumour_yes_low", "tumour_yes_high"]
    assert [spec.name for spec in model.signature.outputs.inputs] == [
        "uri", "tumour_no", "tumour_yes", *ends, *asked_for, "error",
    ]  # fmt: skip
    defaults = {spec.name: spec.default for spec in model.signature.params.params}
    assert defaults == {"attention": False, "top_k": 0, "explain": False, "intervals": False}
    requirements = (local / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch==") for line in requirements)
    assert yaml.safe_load((local / "conda.yaml").read_text())["dependencies"][-1]["pip"] == requirements
    assert not any("+" in line for line in requirements)
    assert (local / "code" / "pipeline" / "results" / "serving.py").is_file()
    assert (local / "code" / "ips" / "network" / "model.py").is_file()
    assert not list(local.rglob("*.pyc"))


def test_a_model_on_features_brings_the_network_that_makes_them(tracker: Tracker, tmp_path: Path) -> None:
    """Its weights lay where it was trained, and are not there any more."""
    weights = tmp_path / "w.pth"
    config = features_config(weights)
    model_folder = tmp_path / "model"
    model_folder.mkdir()
    write_model(model_folder, config)
    write_slide(tmp_path / "s.png", 5)
    slide = str(tmp_path / "s.png")
    options = {"cohort": None, "tracking_uri": tracker.uri}
    before = predict(str(model_folder), [slide], out=tmp_path / "before", **options)  # type: ignore[arg-type]
    version = _register(tracker, "on-features", model_folder)
    weights.unlink()

    shared_embedder.cache_clear()
    after = predict(version.uri, [slide], out=tmp_path / "after", **options)  # type: ignore[arg-type]
    assert (before["failed"], after["failed"]) == ({}, {})
    tables = [read_table(tmp_path / name / "slides" / "s" / "attention.parquet") for name in ("before", "after")]
    assert tables[0].equals(tables[1])

    _, folder = fetch(tracker, version.uri, tmp_path / "fetched")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "embed.weights", "weights.safetensors"]
    _, loaded = load_model(folder)
    assert loaded.embed is not None
    assert loaded.embed.encoder.weights == str(folder / "embed.weights")
    with pytest.raises(StorageError, match="w.pth: it does not exist"):
        _register(tracker, "on-features", model_folder)


def features_config(weights: Path) -> Config:
    """A model on features of a truncated network whose random weights are written to a file."""
    encoder = {"name": "resnet18", "stages": 2}
    torch.manual_seed(0)
    trunk, dim = build_encoder(EmbedConfig.model_validate({"encoder": encoder}).encoder)
    torch.save(trunk.state_dict(), weights)
    return small_config(
        embed={"encoder": {**encoder, "weights": str(weights)}, "batch": 8},
        model={
            "encoder": {"name": "features", "features": dim, "dim": 16},
            "aggregator": {"heads": 2, "key_dim": 4, "hidden_dim": 16},
            "select": {"memory": 5, "chunk": 7},
        },
        train={"augment": False},
    )


@pytest.mark.slow
def test_a_host_without_the_product_loads_it_and_a_bad_slide_fails_alone(
    tracker: Tracker, registered: RegisteredVersion, model_folder: Path, tmp_path: Path
) -> None:
    write_slide(tmp_path / "good.png", 5)
    code = f"""
import json, sys
import mlflow, pandas as pd
assert "pipeline" not in sys.modules
mlflow.set_tracking_uri({tracker.uri!r})
model = mlflow.pyfunc.load_model({registered.uri!r})
rows = pd.DataFrame({{"uri": ["good.png", "none.png"]}})
print(model.predict(rows, params={{"top_k": 2, "explain": True}}).to_json(orient="records"))
import pipeline
assert "artifacts" in pipeline.__path__[0], pipeline.__path__
assert not {{"ray", "hydra", "typer"}} & set(sys.modules), "the serving host needs more than is listed"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    good, bad = json.loads(done.stdout.splitlines()[-1])
    model, config = load_model(model_folder)
    slide = CohortSlide("good", str(tmp_path / "good.png"), "p", None, None, {}, {})
    expected = predict_slide(model, config, slide).values["tumour"]
    assert [good["tumour_no"], good["tumour_yes"]] == pytest.approx(expected, abs=1e-5)
    assert good["error"] is None
    assert len(good["top"]) == 2
    assert "effect_tumour_yes" in good["top"][0]
    assert bad["tumour_yes"] is None
    assert "none.png" in bad["error"]


@pytest.mark.slow
def test_through_a_tracking_server_and_stdout_stays_free(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serve_mlflow(tmp_path) as uri:
        remote = open_tracking(uri, "served", str(tmp_path / "artifacts"))
        registered = _register(remote, "remote", model_folder)
        promote(remote, "remote", registered.version)
        version, folder = fetch(remote, "models:/remote@champion", tmp_path / "fetched")
    assert version == registered
    assert (folder / "weights.safetensors").read_bytes() == (model_folder / "weights.safetensors").read_bytes()
    assert capfd.readouterr().out == ""
