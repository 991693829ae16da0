from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cohort.frozen import Case, Manifest, freeze
from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.errors import CohortError, ConfigError, ReleaseError
from pipeline.release.arrivals import Arrivals, Seen, last_seen, look, remember
from pipeline.release.cycle import Cycle
from pipeline.release.retrain import EXIT_CODES, retrain
from pipeline.storage.lease import held
from tests.pipeline.release.quarter import Growing
from tests.pipeline.small import small_config

DAY_S = 86_400.0


@pytest.fixture
def grown(tmp_path: Path) -> Growing:
    """A cohort whose last retraining has just ended."""
    growing = Growing(tmp_path / "slides")
    growing.add("jan", 5)
    _end(growing, 1000.0)
    return growing


def _end(growing: Growing, at: float, *overrides: str) -> None:
    config = growing.config(*overrides)
    found = look(config)
    remember(config.storage.root, Seen(found.digest, at, at, "promoted", "d", found.rows), {})


def test_without_a_gate_nothing_is_retrained(tmp_path: Path) -> None:
    growing = Growing(tmp_path / "slides")
    growing.add("jan", 3)
    with pytest.raises(ConfigError, match="gate: is required to retrain: no model is promoted unseen"):
        retrain(growing.ungated())
    rules = ("floors=[]", "no_worse=null", "drift=null", "lost=null", "first=hold")
    with pytest.raises(ConfigError, match="gate: no rule is set"):
        growing.config(*(f"gate.{rule}" for rule in rules))


def test_patients_of_several_slides_are_not_retrained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cohort.bag: patient: `retrain` compares and watches slide by slide"):
        retrain(small_config(cohort={"uri": "c.csv", "bag": "patient"}))


def test_nothing_new_is_told_and_costs_nothing(grown: Growing) -> None:
    result = retrain(grown.config(), now=lambda: 1000.0 + DAY_S)
    assert (result.outcome, result.exit_code, result.facts["last"]) == ("nothing to do", 0, "promoted")
    latest = json.loads((grown.folder.parent / "root" / "release" / "latest.json").read_text())
    assert (latest["outcome"], latest["exit_code"], latest["ended"]) == ("nothing to do", 0, 1000.0 + DAY_S)


@pytest.mark.parametrize(("days", "outcome", "code"), [(7.9, "nothing to do", 0), (8.1, "overdue", 6)])
def test_slides_that_were_expected_and_did_not_come_are_their_own_outcome(
    grown: Growing, days: float, outcome: str, code: int
) -> None:
    result = retrain(grown.config("retrain.expect_new_within=8d"), now=lambda: 1000.0 + days * DAY_S)
    assert (result.outcome, result.exit_code) == (outcome, code)
    if code:
        assert "no new slide has come for 8.1 days, and one was expected within 8d" in result.why[0]


@pytest.mark.parametrize("outcome", ["nothing to do", "promoted"])
def test_slides_that_do_not_come_are_told_of_while_another_one_cannot_be_reached(
    outcome: str, grown: Growing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the champion itself, or with the decision of the last time."""
    config, root = grown.config("retrain.expect_new_within=8d"), str(grown.folder.parent / "root")
    found = last_seen(root)
    assert found is not None
    remember(root, replace(found, digest=""), {})
    again = Cycle(outcome, ("as before",), {}, None if outcome == "nothing to do" else "d", whole=False, contents={})
    monkeypatch.setattr("pipeline.release.cycle.retrain_now", lambda *_: again)
    assert retrain(config, now=lambda: 1000.0 + 7.9 * DAY_S).outcome == "nothing to do"
    result = retrain(config, now=lambda: 1000.0 + 8.1 * DAY_S)
    assert (result.outcome, result.exit_code) == ("overdue", 6)


def test_tasks_that_the_frozen_test_cannot_measure_are_refused_before_anything_is_begun(grown: Growing) -> None:
    root = grown.folder.parent / "root"
    freeze(str(root), Manifest(1, "test", (Case("s", "p", "k", {"tumour": "maybe"}),)))
    grown.add("feb", 1)
    with pytest.raises(ConfigError, match=r"tasks.0: test 1, .* none of task tumour now: maybe; .*refresh_test=1"):
        retrain(grown.config())
    assert not (root / "stages").exists()


def test_a_slide_that_was_renamed_has_not_come(grown: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    config, root = grown.config("retrain.expect_new_within=8d"), str(grown.folder.parent / "root")
    before = last_seen(root)
    assert before is not None
    remember(root, before, {slide: f"content of {slide}" for slide in before.rows})
    grown.rows[0] = ("renamed", grown.rows[0][1])
    (grown.folder / "jan-00.png").rename(grown.folder / "renamed.png")
    grown.write()
    (gone,) = set(before.rows) - set(look(config).rows)
    holds = {slide: f"content of {slide}" for slide in before.rows if slide != gone}
    holds[fingerprint("renamed")] = f"content of {gone}"
    cycle = Cycle("nothing to do", ("as before",), {}, None, whole=True, contents=holds)
    monkeypatch.setattr("pipeline.release.cycle.retrain_now", lambda *_: cycle)
    result = retrain(config, now=lambda: 1000.0 + 8.1 * DAY_S)
    assert (result.outcome, result.facts["since_last"]["renamed"], result.facts["since_last"]["added"]) == (
        "overdue", 1, 0,
    )  # fmt: skip
    seen = last_seen(root)
    assert seen is not None
    assert seen.arrived == 1000.0


def test_a_reason_to_force_says_something(grown: Growing) -> None:
    with pytest.raises(ReleaseError, match="say one"):
        retrain(grown.config(), force=" ")


def test_two_at_once_are_one(grown: Growing) -> None:
    lease = grown.folder.parent / "root" / "release" / "retrain.lease"
    with held(str(lease), "the first"):
        result = retrain(grown.config())
    assert (result.outcome, result.exit_code) == ("busy", 0)


def test_of_two_that_begin_in_the_same_moment_the_last_claim_works(
    grown: Growing, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = grown.folder.parent / "root" / "release" / "retrain.lease"

    def late(config: Config) -> Arrivals:
        lease.write_text(lease.read_text().replace(json.loads(lease.read_text())["token"], "another"))
        return look(config)

    monkeypatch.setattr("pipeline.release.retrain.look", late)
    grown.add("feb", 1)
    result = retrain(grown.config())
    assert (result.outcome, result.exit_code) == ("busy", 0)
    assert not lease.with_name("latest.json").exists()


def test_a_failure_is_told_too(grown: Growing) -> None:
    before = last_seen(str(grown.folder.parent / "root"))
    (grown.folder / "cohort.csv").write_text("slide_id,uri,label\na,a.png,perhaps\n")
    with pytest.raises(CohortError):
        retrain(grown.config())
    latest = json.loads((grown.folder.parent / "root" / "release" / "latest.json").read_text())
    assert (latest["outcome"], latest["error"], latest["exit_code"]) == ("failed", "CohortError", 2)
    assert "perhaps" in latest["message"]
    assert last_seen(str(grown.folder.parent / "root")) == before  # so the next one does what this one should have


def test_every_outcome_has_its_exit_code() -> None:
    assert EXIT_CODES == {"promoted": 0, "nothing to do": 0, "busy": 0, "rejected": 4, "held": 4, "overdue": 6}


def test_finding_nothing_new_loads_nothing_that_trains(grown: Growing) -> None:
    code = (
        "import sys\n"
        "from pipeline.config.compose import load_config\n"
        "from pipeline.release.retrain import retrain\n"
        "assert retrain(load_config('default', sys.argv[1:])).outcome == 'nothing to do'\n"
        "heavy = ('torch', 'ray', 'mlflow', 'pandas', 'matplotlib')\n"
        "print(*[name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *grown.overrides], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
