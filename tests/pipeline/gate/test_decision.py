from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.release import FloorRule, GateConfig, NoWorseRule
from pipeline.errors import StageError
from pipeline.gate.decision import DECISION, EVIDENCE, decide, decision_bytes, digest, replay
from pipeline.gate.evidence import Evidence, parse
from pipeline.storage.files import write_json
from tests.pipeline.gate.made import SLIDES, evidence, predictions, scores

MANIFEST = {"version": 1, "digest": "m", "slides": SLIDES, "patients": 31, "missing": 0, "relabelled": 0}
GATE = GateConfig(no_worse=NoWorseRule(margin=0.25, least=10))


def _rules(decision: Mapping[str, Any]) -> dict[str, str]:
    return {rule["rule"]: rule["outcome"] for rule in decision["rules"]}


def test_a_model_as_good_as_the_champion_is_promoted_and_a_worse_one_rejected() -> None:
    good = decide(evidence(GATE, candidate=predictions("2", scores(0.1, seed=5))))
    assert (good["verdict"], good["why"], good["forced"]) == ("promote", ["every rule is met"], None)
    assert good["candidate"]["version"] == "2"
    assert good["names_champion"] == "1"
    bad = decide(evidence(GATE, candidate=predictions("2", scores(0.6, seed=5))))
    assert bad["verdict"] == "reject"
    (why,) = bad["why"]
    assert why.startswith("the difference to the champion in auc of tumour is -0.")
    assert bad["candidate"]["measures"]["tumour"]["auc"] < bad["champion"]["measures"]["tumour"]["auc"] - 0.1
    assert _rules(bad)["no worse tumour auc"] == "not met"


@pytest.mark.parametrize(
    ("changes", "verdict", "rule"),
    [
        ({"unscorable": "its files are gone", "champion": None}, "hold", "champion"),
        ({"champion": None, "names_champion": None}, "hold", "first"),
        ({"candidate": predictions("2", scores(0.1), seen=("s3",))}, "reject", "contamination candidate"),
        ({"candidate": predictions("2", scores(0.1), seen=None)}, "hold", "contamination candidate"),
        ({"champion": predictions("1", scores(0.1), seen=("s3", "s4"))}, "hold", "contamination champion"),
        ({"champion": predictions("1", scores(0.1), seen=None)}, "hold", "contamination champion"),
        ({"manifest": {**MANIFEST, "missing": 6}}, "hold", "test missing"),
        ({"manifest": {**MANIFEST, "relabelled": 5}}, "hold", "test relabelled"),
    ],
)
def test_what_no_config_turns_off(changes: dict[str, Any], verdict: str, rule: str) -> None:
    decision = decide(evidence(GATE, **changes))
    assert decision["verdict"] == verdict
    assert _rules(decision)[rule] == "not met"
    forced = decide(evidence(GATE, force="the old one reads no more", **changes))
    assert forced["verdict"] == ("promote" if verdict == "hold" else "reject")
    assert forced["forced"] == ("the old one reads no more" if verdict == "hold" else None)
    assert forced["why"] == decision["why"]


def test_the_first_model_is_judged_by_floors_alone_where_the_config_says_so() -> None:
    first: dict[str, Any] = {"champion": None, "names_champion": None}
    floors = (FloorRule(measure="auc", bound=0.8),)
    gate = GateConfig(floors=floors, no_worse=NoWorseRule(least=10), first="floors")
    assert decide(evidence(gate, **first))["verdict"] == "promote"
    assert decide(evidence(gate.model_copy(update={"first": "hold"}), **first))["verdict"] == "hold"
    poor = decide(evidence(gate, candidate=predictions("2", scores(0.6)), **first))
    assert poor["verdict"] == "reject"
    assert poor["why"][0].startswith("auc of tumour is 0.6895, asked is at least 0.8")


def test_a_person_is_asked_where_the_config_wants_one_and_a_rejection_comes_before() -> None:
    gate = GateConfig(approval=True, no_worse=NoWorseRule(margin=0.25, least=10))
    assert decide(evidence(gate))["verdict"] == "hold"
    assert decide(evidence(gate, candidate=predictions("2", scores(0.6))))["verdict"] == "reject"


def test_a_model_that_a_person_took_back_waits_for_a_person_whatever_is_forced() -> None:
    says = "version 2 was taken back by ada on 2026-01-02: worse on the ward"
    held = decide(evidence(GATE, taken_back=says, force="it is the best we have"))
    assert (held["verdict"], held["forced"]) == ("hold", None)
    assert held["why"] == [f"{says}; only `promote --approve 2` makes it champion again"]


def _store(folder: Path, found: Evidence) -> Path:
    write_json(str(folder / EVIDENCE), found.plain())
    (folder / DECISION).write_bytes(decision_bytes(decide(found)))
    return folder / DECISION


def test_a_decision_can_be_taken_again_to_the_byte(tmp_path: Path) -> None:
    found = evidence(GATE)
    uri = _store(tmp_path, found)
    data, difference = replay(str(uri))
    assert difference is None
    assert data == uri.read_bytes() == decision_bytes(decide(parse(found.plain())))
    said = json.loads(data)
    said["verdict"] = "reject"
    uri.write_bytes(decision_bytes(said))
    assert replay(str(uri)) == (data, "it was changed, or is of another evidence")
    changed = replace(found, candidate=predictions("2", scores(0.2)))
    write_json(str(tmp_path / EVIDENCE), changed.plain())
    with pytest.raises(StageError, match=f"was decided by {found.digest}: it is another file"):
        replay(str(uri))
    assert digest(decide(found)) != digest(decide(changed))


def test_a_decision_of_other_software_that_differs_says_so(tmp_path: Path) -> None:
    found = evidence(GATE)
    uri = _store(tmp_path, replace(found, software={**found.software, "numpy": "1.0"}))
    assert replay(str(uri))[1] is None
    uri.write_bytes(uri.read_bytes().replace(b'"hold"', b'"block"'))
    assert str(replay(str(uri))[1]).startswith("it was taken with numpy 1.0, and this is ")
