from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.cohort.table import Cohort
from pipeline.config.recipe import Config
from pipeline.model.build import build_model, build_optimizer
from pipeline.model.calibration import Cases, calibration_json, read_calibration
from pipeline.model.checkpoint import Progress, take_snapshot
from pipeline.tracking.registry import champion, fetch
from pipeline.tracking.tracker import Tracker, open_tracking
from pipeline.training.saver import Saver
from pipeline.workflow import register
from pipeline.workflow.stage import Record, Workspace
from tests.pipeline.small import small_config, write_cohort

# MLflow 3.17 on SQLAlchemy 2.1 and pandas 3
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

Made = Callable[[str], tuple[Workspace, str]]

CASES = {"tumour": Cases(np.array([[0.2, 0.8]]), np.array([[0.0, 1.0]]))}
TRAINED = {"train_slides": 5, "val_slides": 2}
MEASURED = {"test_auc": 0.5, "test_slides": 3.0}


@pytest.fixture(scope="module")
def tracker(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return open_tracking(mlflow_uri, "registration", str(tmp_path_factory.mktemp("artifacts")))


@pytest.fixture
def made(tracker: Tracker, tmp_path: Path) -> Made:
    """A name of a recipe -> the workspace after its evaluation, and the run in which to register."""
    config: Config = small_config(tracking={"uri": tracker.uri, "model": tmp_path.name})
    cohort: Cohort = write_cohort(tmp_path, ["no"])
    model = build_model(config)
    with Saver(str(tmp_path / "run")) as saver:
        saver.save(take_snapshot(model, build_optimizer(model, config.train), config, Progress(1, 1, "plan")))
    folder = str(tmp_path / "run" / "step-00000001")
    (tmp_path / "cases.json").write_text(json.dumps(calibration_json(CASES)))

    def make(recipe: str) -> tuple[Workspace, str]:
        space = Workspace(config, cohort, lambda: tracker, lambda: None, {"git_sha": "abc"})
        space.records = {
            "tile": Record("tile", "t", {}, {}, {"keys": {"s0": "key"}}),
            "train": Record(
                "train", f"train-{recipe}", {"checkpoint": folder}, {}, {"train_slides": 5, "val_slides": 2}, "run"
            ),
            "evaluate": Record(
                "evaluate",
                f"evaluate-{recipe}",
                {"report": "r.html", "calibration": str(tmp_path / "cases.json")}
                if recipe == "a"
                else {"report": "r.html"},
                {"test_auc": 0.5, "test_slides": 3.0},
                {"slides": 3},
                "e",
            ),
        }
        return space, tracker.start_run("register")

    return make


def test_the_recipe_run_last_is_champion_and_no_version_is_made_twice(
    made: Made, tracker: Tracker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (a, run_a), (b, run_b) = made("a"), made("b")
    name = str(a.config.tracking.model)
    first = register.register(a, "fa", run_a)
    assert register.outdated(a, first) is None
    said = tracker.client.get_model_version(str(first.facts["model"]), str(first.facts["version"])).description
    assert (
        "trained on 5 slides, validated on 2. On 3 slides of the test split: test_auc 0.500.\n\nReport: r.html" in said
    )
    assert "no intervals" not in caplog.text
    second = register.register(b, "fb", run_b)
    assert "will have no intervals" in caplog.text
    assert "runs anew with another evaluate.bootstrap" in caplog.text
    for version, expected in (("1", ["tumour"]), ("2", [])):  # that of b was evaluated before there were any
        _, folder = fetch(tracker, f"models:/{name}/{version}", tmp_path / version)
        assert list(read_calibration(folder, small_config().tasks)) == expected
    assert (first.facts["version"], second.facts["version"], second.facts["previous"]) == ("1", "2", "1")
    assert register.outdated(b, second) is None
    assert register.outdated(a, first) == f"version 1 of {name} is registered, but the champion is 2"

    again = register.register(a, "fa", run_a)
    assert (again.facts["version"], again.facts["previous"]) == ("1", "2")
    assert champion(tracker, name) == "1"
    assert len(tracker.client.search_model_versions(f"name='{name}'")) == 2
    tags = tracker.client.get_model_version(name, "1").tags
    assert tags["git_sha"] == "abc"
    assert len(tags["slide_keys_digest"]) == 16

    tracker.client.delete_registered_model_alias(name, "champion")
    assert register.outdated(a, again) == f"version 1 of {name} is registered, but the champion is nobody"


def test_a_registry_that_lost_the_model_is_noticed(made: Made, tracker: Tracker, tmp_path: Path) -> None:
    space, run_id = made("a")
    name = str(space.config.tracking.model)
    record = register.register(space, "f", run_id)
    tracker.client.delete_registered_model(name)
    assert register.outdated(space, record) == f"version 1 of {name} is no longer in the registry"
    gone = space.config.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/gone.db"})
    space.config = space.config.model_copy(update={"tracking": gone})
    assert "gone.db does not exist" in str(register.outdated(space, record))
