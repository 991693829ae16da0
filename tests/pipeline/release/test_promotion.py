from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import Config
from pipeline.errors import ReleaseError, StageError, TrackingError
from pipeline.gate.decision import DECISION, decision_bytes, digest
from pipeline.release.history import Act, acts, last_act
from pipeline.release.promotion import (
    act_on,
    approve,
    decision_folder,
    lease_uri,
    project,
    repair,
    rollback,
    settled,
)
from pipeline.release.standing import status
from pipeline.storage.files import write_bytes
from pipeline.storage.lease import held
from pipeline.tracking.registry import alias_version, gated_by, point
from pipeline.tracking.tracker import Tracker, open_tracking
from tests.pipeline.small import small_config

# MLflow 3.17 on SQLAlchemy 2.1 and pandas 3
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture
def tracker(mlflow_uri: str, tmp_path: Path) -> Tracker:
    return open_tracking(mlflow_uri, "promotion", str(tmp_path / "artifacts"))


@pytest.fixture
def config(tracker: Tracker, tmp_path: Path) -> Config:
    """Of a model with five versions, of which none is anything yet."""
    tracker.client.create_registered_model(tmp_path.name)
    for _ in range(5):
        tracker.client.create_model_version(tmp_path.name, str(tmp_path), None)
    return small_config(storage={"root": str(tmp_path / "root")}, tracking={"uri": tracker.uri, "model": tmp_path.name})


def _decide(config: Config, candidate: str, champion: str | None, verdict: str) -> tuple[dict[str, Any], str]:
    """A stored decision, and its digest."""
    decision = {
        "candidate": {"version": candidate, "train": f"t{candidate}"},
        "names_champion": champion,
        "verdict": verdict,
        "why": [f"{verdict} {candidate}"],
    }
    name = digest(decision)
    write_bytes(f"{decision_folder(config.storage.root, name)}/{DECISION}", decision_bytes(decision))
    return decision, name


def _conclude(config: Config, tracker: Tracker, candidate: str, verdict: str) -> Act:
    with held(lease_uri(config), "test") as lease:
        before = settled(config, tracker, lease)
        decision, name = _decide(config, candidate, before.champion if before else None, verdict)
        act = act_on(config, decision, name, before)
        project(tracker, act, lease)
        return act


def _aliases(config: Config, tracker: Tracker) -> tuple[str | None, ...]:
    name = str(config.tracking.model)
    return tuple(alias_version(tracker, name, alias) for alias in ("champion", "previous", "challenger"))


def test_decisions_become_aliases(config: Config, tracker: Tracker) -> None:
    with held(lease_uri(config), "test") as lease:
        assert settled(config, tracker, lease) is None
    _conclude(config, tracker, "1", "promote")
    assert _aliases(config, tracker) == ("1", None, None)
    _conclude(config, tracker, "2", "reject")
    assert _aliases(config, tracker) == ("1", None, None)
    _conclude(config, tracker, "3", "hold")
    assert _aliases(config, tracker) == ("1", None, "3")
    _conclude(config, tracker, "4", "promote")
    assert _aliases(config, tracker) == ("4", "1", None)
    assert [act.kind for act in acts(config.storage.root, str(config.tracking.model))] == [
        "promote",
        "reject",
        "hold",
        "promote",
    ]


def test_a_champion_from_before_is_adopted(config: Config, tracker: Tracker) -> None:
    name = str(config.tracking.model)
    point(tracker, name, "champion", "3")
    with held(lease_uri(config), "test") as lease:
        act = settled(config, tracker, lease)
    assert act is not None
    assert (act.kind, act.champion, act.number) == ("adopt", "3", 1)
    assert gated_by(tracker, name) == config.storage.root


def test_a_champion_that_someone_else_moved_stops_everything_until_a_person_decides(
    config: Config, tracker: Tracker
) -> None:
    name = str(config.tracking.model)
    _conclude(config, tracker, "1", "promote")
    point(tracker, name, "champion", "5")
    with pytest.raises(ReleaseError, match=r"the champion of .* is 5, and the last decision .* says 1: someone moved"):
        _conclude(config, tracker, "2", "promote")
    assert _aliases(config, tracker)[0] == "5"
    found = status(config)
    assert (found["champion"], found["registry"]["champion"], found["agrees"]) == ("1", "5", False)
    repair(config)
    assert _aliases(config, tracker) == ("1", None, None)
    point(tracker, name, "champion", "5")
    act = approve(config, "4", "ada", "measured by hand")
    assert (act.was, act.champion, act.previous, act.by) == ("5", "4", "5", "ada")
    assert _aliases(config, tracker) == ("4", "5", None)


def test_a_person_approves_what_waits_and_nothing_else(config: Config, tracker: Tracker) -> None:
    with pytest.raises(ReleaseError, match="no decision of .* is about version 2"):
        approve(config, "2", "ada", None)
    _conclude(config, tracker, "1", "promote")
    _conclude(config, tracker, "2", "hold")
    waits = status(config)["waits"]
    assert waits == {"version": "2", "why": ["hold 2"]}
    act = approve(config, "2", "ada", None)
    assert (act.kind, act.by, act.why) == ("approve", "ada", ("approved, after the gate said hold: hold 2",))
    assert _aliases(config, tracker) == ("2", "1", None)
    with pytest.raises(ReleaseError, match="is the champion already"):
        approve(config, "2", "ada", "again")
    _conclude(config, tracker, "3", "reject")
    with pytest.raises(ReleaseError, match="version 3 was rejected: reject 3; --force REASON"):
        approve(config, "3", "ada", None)
    _conclude(config, tracker, "4", "hold")
    approve(config, "3", "ada", "the test was wrong")
    assert _aliases(config, tracker) == ("3", "2", None)
    with pytest.raises(ReleaseError, match="version 4 was compared with version 2, and the champion is 3 by now"):
        approve(config, "4", "ada", None)
    with pytest.raises(TrackingError, match="has versions"):
        approve(config, "9", "ada", "there is none")


def test_a_decision_that_was_changed_afterwards_allows_nothing(config: Config, tracker: Tracker) -> None:
    _conclude(config, tracker, "1", "promote")
    act = _conclude(config, tracker, "2", "reject")
    path = Path(decision_folder(config.storage.root, str(act.decision))) / DECISION
    path.write_text(path.read_text().replace('"verdict":"reject"', '"verdict":"hold"'))
    with pytest.raises(ReleaseError, match=r"decision\.json has the digest .* the file was changed"):
        approve(config, "2", "ada", None)
    assert _aliases(config, tracker) == ("1", None, None)


@pytest.mark.parametrize("reason", ["", " "])
def test_a_reason_says_something(reason: str, config: Config, tracker: Tracker) -> None:
    _conclude(config, tracker, "1", "promote")
    _conclude(config, tracker, "2", "promote")
    with pytest.raises(ReleaseError, match="a reason is kept for those who ask later; say one"):
        approve(config, "3", "ada", reason)
    with pytest.raises(ReleaseError, match="say one"):
        rollback(config, "ada", reason)
    assert _aliases(config, tracker) == ("2", "1", None)


def test_a_champion_that_someone_took_back_by_hand_stays_until_a_person_decides(
    config: Config, tracker: Tracker
) -> None:
    _conclude(config, tracker, "1", "promote")
    _conclude(config, tracker, "2", "promote")
    point(tracker, str(config.tracking.model), "champion", "1")  # in MLflow's pages, say
    with pytest.raises(ReleaseError, match="is 1, and the last decision .* says 2: someone moved it"):
        _conclude(config, tracker, "3", "promote")
    assert _aliases(config, tracker)[0] == "1"
    assert repair(config).champion == "2"
    assert _aliases(config, tracker) == ("2", "1", None)


def test_the_way_back(config: Config, tracker: Tracker) -> None:
    with pytest.raises(ReleaseError, match="no previous champion"):
        rollback(config, "ada", "worse on the ward")
    with pytest.raises(ReleaseError, match="holds no decision"):
        repair(config)
    _conclude(config, tracker, "1", "promote")
    _conclude(config, tracker, "2", "promote")
    act = rollback(config, "ada", "worse on the ward")
    assert (act.champion, act.previous, act.why) == ("1", "2", ("worse on the ward",))
    assert _aliases(config, tracker) == ("1", "2", None)
    found = status(config)
    assert (found["champion"], found["by"], found["agrees"]) == ("1", "ada", True)
    assert found["since"] == act.at


def test_one_process_at_a_time_moves_aliases(config: Config, tracker: Tracker) -> None:
    _conclude(config, tracker, "1", "promote")
    with held(lease_uri(config), "another"), pytest.raises(StageError, match="is at work on it"):
        repair(config)


def _delete(config: Config, tracker: Tracker, version: str) -> None:
    tracker.client.delete_model_version(str(config.tracking.model), version)


def test_a_champion_that_was_deleted_is_said_to_be_that_and_a_person_goes_back_or_on(
    config: Config, tracker: Tracker
) -> None:
    for version, verdict in (("1", "promote"), ("2", "promote"), ("3", "hold")):
        _conclude(config, tracker, version, verdict)
    _delete(config, tracker, "2")
    says = r"version 2 of .*, the champion by the last decision \(act 3, .*\), is not in the registry .* deleted it"
    with pytest.raises(ReleaseError, match=f"{says}. `release rollback --reason WHY` makes version 1, the champion"):
        _conclude(config, tracker, "4", "promote")
    point(tracker, str(config.tracking.model), "previous", None)
    with pytest.raises(ReleaseError, match=says):
        repair(config)
    assert _aliases(config, tracker) == (None, "1", "3")  # all else is repaired
    found = status(config)
    assert (found["champion"], found["registry"]["champion"], found["agrees"]) == ("2", None, False)
    assert "someone deleted it" in found["wrong"][0]
    act = rollback(config, "ada", "it was deleted")
    assert (act.was, act.champion, act.previous) == ("2", "1", None)
    assert _aliases(config, tracker) == ("1", None, None)
    assert status(config)["agrees"]
    _conclude(config, tracker, "4", "promote")
    _delete(config, tracker, "4")
    with pytest.raises(ReleaseError, match="version 5 was rejected|no decision of .* is about version 5"):
        approve(config, "5", "ada", None)
    act = approve(config, "5", "ada", "the only one that is left")
    assert (act.champion, _aliases(config, tracker)) == ("5", ("5", None, None))


def test_what_waits_is_let_in_although_the_champion_was_deleted(config: Config, tracker: Tracker) -> None:
    _conclude(config, tracker, "1", "promote")
    _conclude(config, tracker, "2", "hold")
    _delete(config, tracker, "1")
    assert approve(config, "2", "ada", None).previous is None
    assert _aliases(config, tracker) == ("2", None, None)


def test_a_previous_or_waiting_version_that_was_deleted_is_nobody_and_holds_nothing_up(
    config: Config, tracker: Tracker
) -> None:
    for version, verdict in (("1", "promote"), ("2", "promote"), ("3", "hold")):
        _conclude(config, tracker, version, verdict)
    _delete(config, tracker, "1")
    _delete(config, tracker, "3")
    found = status(config)
    assert found["agrees"]
    assert found["wrong"] == [
        "challenger, version 3, was deleted in the registry, and is nobody now",
        "previous, version 1, was deleted in the registry, and is nobody now",
    ]
    assert repair(config).champion == "2"
    with pytest.raises(ReleaseError, match="version 1 of .*, the champion before, is not in the registry .* any more"):
        rollback(config, "ada", "worse on the ward")
    assert _aliases(config, tracker) == ("2", None, None)
    _conclude(config, tracker, "4", "promote")
    assert _aliases(config, tracker) == ("4", "2", None)


_KILLED = """
import os, signal, sys
from pipeline.release import promotion
from tests.pipeline.release import test_promotion as tests
from pipeline.tracking.tracker import connect
config = tests.Config.model_validate_json(sys.argv[1])
def dying(before):
    def call(*args, **named):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return before(*args, **named)
    return call
for line in sys.stdin:
    left, child = int(line), os.fork()
    if child == 0:
        promotion.append = dying(promotion.append)
        promotion.point = dying(promotion.point)
        tests._conclude(config, connect(config.tracking.uri), "2", "promote")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow  # 8 s: a program that loads MLflow, and five more that it forks
def test_a_kill_at_any_step_leaves_one_champion_the_one_that_was_decided(config: Config, tracker: Tracker) -> None:
    _conclude(config, tracker, "1", "promote")
    _conclude(config, tracker, "3", "hold")  # so that all three aliases have to move
    ended = []
    helper = subprocess.Popen(
        [sys.executable, "-c", _KILLED, config.model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert helper.stdin is not None
    assert helper.stdout is not None
    for step in range(5):
        print(step, file=helper.stdin, flush=True)
        ended.append(int(helper.stdout.readline()))
        act = last_act(config.storage.root, str(config.tracking.model))
        assert act is not None
        champion, previous, _ = _aliases(config, tracker)
        assert champion in ("1", "2")
        assert (champion == "2") <= (previous == "1")  # previous is there before the champion moves
        with held(lease_uri(config), "test") as lease:
            after = settled(config, tracker, lease)
        assert after is not None
        assert after.champion == act.champion == ("1" if step == 0 else "2")
        assert _aliases(config, tracker) == (act.champion, act.previous, act.challenger)
        assert status(config)["agrees"]
        (path := Path(config.storage.root) / "release" / "history" / str(config.tracking.model) / "000003.json").unlink(
            missing_ok=True
        )
        for alias, version in (("champion", "1"), ("previous", None), ("challenger", "3")):
            point(tracker, str(config.tracking.model), alias, version)
        assert not path.exists()
    helper.communicate()
    assert ended == [-signal.SIGKILL] * 4 + [0]
