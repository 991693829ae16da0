"""Whole retrainings in this process; those of a schedule, with kills, stand in `test_quarter`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import ReleaseError
from pipeline.release.arrivals import look
from pipeline.release.cycle import retrain_now
from pipeline.release.history import acts
from pipeline.release.promotion import approve
from pipeline.release.retrain import Result, retrain
from pipeline.release.standing import status
from pipeline.tracking.registry import alias_version, point
from pipeline.tracking.tracker import connect
from pipeline.workflow.run import plan, run
from tests.pipeline.release.quarter import Growing

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,  # 2 minutes: six small trainings
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Operation with range:DeprecationWarning"),
]


def _decision(result: Result) -> dict[str, str]:
    return {rule["rule"]: rule["outcome"] for rule in result.facts["decision"]["rules"]}


def test_a_cohort_grows_and_one_model_is_champion_at_every_moment(ray_session: None, tmp_path: Path) -> None:
    growing = Growing(tmp_path / "slides")
    growing.add("jan", 40)
    config = growing.config()
    first = retrain(config)
    assert (first.outcome, first.exit_code, first.facts["champion"]) == ("promoted", 0, "1")
    test = set(json.loads((tmp_path / "root/release/test-0001.json").read_text())["cases"][0])
    assert test == {"slide", "patient", "key", "labels"}
    assert retrain(config).outcome == "nothing to do"

    growing.add("feb", 12)
    second = retrain(config)
    assert second.facts["since_last"]["added"] == second.facts["diff"]["added"] == 12
    changes = Path(second.facts["pages"]["gate"]).with_name("changes.csv").read_text().splitlines()
    assert changes[:2] == ['"slide_id","change"', '"feb-00","added"']
    assert _decision(second)["no worse tumour auc"] in ("met", "too few")
    if second.outcome == "held":
        approve(config, second.facts["version"], "ada", None)
    assert status(config)["champion"] == "2"

    growing.add("mar", 12, shade=50)
    third = retrain(config)
    assert (third.outcome, third.exit_code, _decision(third)["drift"]) == ("held", 4, "not met")
    assert Path(third.facts["pages"]["drift"]).is_file()
    found = status(config)
    assert (found["champion"], found["waits"]["version"], found["agrees"]) == ("2", "3", True)
    assert retrain(config).outcome == "nothing to do"

    assert run(config).stages["register"].outcome == "done"  # `run` enters the model, and moves nobody
    assert alias_version(connect(str(config.tracking.uri)), "quarter", "champion") == "2"
    assert [item.action for item in plan(config)] == ["skip"] * 4
    kinds = [act.kind for act in acts(config.storage.root, "quarter")]
    assert kinds == [
        *(["promote", "promote"] if second.outcome == "promoted" else ["promote", "hold", "approve"]),
        "hold",
    ]

    (growing.folder / "jan-00.png").touch()
    again = retrain(config)
    assert (again.outcome, set(again.facts["since_last"].values())) == ("nothing to do", {0})  # the content is the same

    point(connect(str(config.tracking.uri)), "quarter", "champion", "1")
    growing.add("apr", 2)
    with pytest.raises(ReleaseError, match="someone moved it"):
        retrain_now(config, look(config), None)


@pytest.mark.nightly
def test_a_champion_from_before_the_gate_is_adopted_and_can_be_gone_on_from(ray_session: None, tmp_path: Path) -> None:
    growing = Growing(tmp_path / "slides")
    growing.add("jan", 30)
    run(growing.ungated())
    growing.add("feb", 8)
    config = growing.config(
        "retrain={start: warm, epochs: 2, replay: 0.5}",
        "gate.no_worse={margin: 0.99, least: 3, resamples: 200}",
        "gate.floors=[]",
        "gate.first=hold",
        "gate.drift=null",
    )
    result = retrain(config)
    assert result.outcome == "promoted"
    assert result.facts["decision"]["names_champion"] == "1"
    assert [act.kind for act in acts(config.storage.root, "quarter")] == ["adopt", "promote"]
    record = json.loads(next((tmp_path / "root" / "stages").glob("judge-*.json")).read_text())
    assert record["facts"]["verdict"] == "promote"
    trained = sorted((tmp_path / "root" / "stages").glob("train-*.json"), key=lambda path: path.stat().st_mtime)
    sizes = [json.loads(path.read_text())["facts"]["train_slides"] for path in trained]
    assert sizes[1] < sizes[0]  # half of the old slides, and the few new ones
