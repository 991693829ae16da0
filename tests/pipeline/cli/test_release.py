from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.config.release import FloorRule, GateConfig
from pipeline.gate.decision import DECISION, EVIDENCE, decide, decision_bytes
from pipeline.release.arrivals import Seen, look, remember
from pipeline.release.history import Act, append
from pipeline.storage.files import write_json
from pipeline.tracking.registry import alias_version, point
from pipeline.tracking.tracker import Tracker, open_tracking
from tests.pipeline.gate.made import evidence
from tests.pipeline.release.quarter import Growing

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def test_a_schedule_reads_the_exit_code(tmp_path: Path) -> None:
    growing = Growing(tmp_path / "slides")
    growing.add("jan", 3)
    config = growing.config()
    found = look(config)
    remember(config.storage.root, Seen(found.digest, 1.0, 1.0, "promoted", None, found.rows), {})
    done = CliRunner().invoke(app, ["retrain", "--json", *growing.overrides])
    assert (done.exit_code, json.loads(done.stdout)["outcome"]) == (0, "nothing to do")
    late = CliRunner().invoke(app, ["retrain", *growing.overrides, "retrain.expect_new_within=8d"])
    assert late.exit_code == 6
    assert late.stdout.startswith("overdue: no new slide has come for ")


def test_a_decision_is_taken_again(tmp_path: Path) -> None:
    found = evidence(GateConfig(floors=(FloorRule(measure="auc", bound=0.5),)))
    write_json(str(tmp_path / EVIDENCE), found.plain())
    data = decision_bytes(decide(found))
    (tmp_path / DECISION).write_bytes(data)
    done = CliRunner().invoke(app, ["gate", "--replay", str(tmp_path / DECISION)])
    assert (done.exit_code, done.stdout_bytes) == (0, data)
    (tmp_path / DECISION).write_bytes(data.replace(b'"verdict":"promote"', b'"verdict":"reject"'))
    assert CliRunner().invoke(app, ["gate", "--replay", str(tmp_path / DECISION)]).exit_code == 1


@pytest.fixture
def released(mlflow_uri: str, tmp_path: Path) -> tuple[Tracker, list[str]]:
    """Version 2 is champion after version 1; and the overrides that say where."""
    tracker = open_tracking(mlflow_uri, "cli-release", str(tmp_path / "artifacts"))
    name, root = tmp_path.name, str(tmp_path / "root")
    tracker.client.create_registered_model(name)
    for _ in range(2):
        tracker.client.create_model_version(name, str(tmp_path), None)
    append(root, Act("promote", name, "1", "2", "1", None, "2", None, ("every rule is met",), "retrain"), None)
    point(tracker, name, "champion", "1")
    overrides = ["cohort.uri=c.csv", f"storage.root={root}", f"tracking.uri={tracker.uri}", f"tracking.model={name}"]
    return tracker, overrides


def test_who_is_champion_is_told_repaired_and_taken_back(released: tuple[Tracker, list[str]]) -> None:
    tracker, overrides = released
    name = overrides[-1].partition("=")[2]
    told = CliRunner().invoke(app, ["release", "status", "--json", *overrides])
    assert told.exit_code == 4
    found = json.loads(told.stdout)
    assert (found["champion"], found["registry"]["champion"], found["agrees"]) == ("2", "1", False)
    assert CliRunner().invoke(app, ["release", "repair", *overrides]).exit_code == 0
    assert alias_version(tracker, name, "champion") == "2"
    assert len(found["wrong"]) == 2
    assert "champion is 1 in the registry, and 2 by the last decision; `release repair`" in found["wrong"][0]
    assert "every rule is met" in CliRunner().invoke(app, ["release", "status", *overrides]).stdout

    back = ["release", "rollback", "--reason", "worse on the ward", "--by", "ada", "--json", *overrides]
    act = json.loads(CliRunner().invoke(app, back).stdout)
    assert (act["champion"], act["by"], act["why"]) == ("1", "ada", ["worse on the ward"])
    refused = CliRunner().invoke(app, ["promote", "--approve", "2", "--json", *overrides])
    assert refused.exit_code == 4
    assert "--force REASON" in json.loads(refused.stdout)["message"]
    forced = CliRunner().invoke(app, ["promote", "--approve", "2", "--force", "it was not", *overrides])
    assert forced.exit_code == 0
    assert alias_version(tracker, name, "champion") == "2"
