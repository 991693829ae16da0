"""A quarter on a schedule: months of slides, kills in between, and what registry, decisions and exit codes then are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.gate.decision import replay
from pipeline.release.history import acts, last_act
from pipeline.release.promotion import approve, decision_folder
from pipeline.release.standing import status
from pipeline.tracking.registry import alias_version
from pipeline.tracking.tracker import connect
from tests.pipeline.release.quarter import Growing

pytestmark = [
    pytest.mark.nightly,  # 8 minutes: a dozen trainings on Rays of their own
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Operation with range:DeprecationWarning"),
]


def _command(growing: Growing, *more: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "retrain", "--json", *growing.overrides, *more]


def _retrain(growing: Growing, *more: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(_command(growing, *more), capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def _killed(growing: Growing, when: Callable[[], bool]) -> None:
    """Retrain until something holds, then kill the program and all that it started, as a machine that goes down."""
    told = growing.folder.parent / "killed.log"
    with told.open("w") as log:
        process = subprocess.Popen(_command(growing), stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 300
    while not when():
        assert process.poll() is None, f"it ended before it could be killed: {told.read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _there(root: Path, pattern: str) -> Callable[[], bool]:
    """Whether a file appeared that was not there."""
    before = set(root.glob(pattern))
    return lambda: bool(set(root.glob(pattern)) - before)


def test_a_quarter(tmp_path: Path) -> None:
    growing, root = Growing(tmp_path / "slides"), tmp_path / "root"
    growing.add("jan", 48)
    config = growing.config()

    def champion() -> str | None:
        return alias_version(connect(str(config.tracking.uri)), "quarter", "champion")

    _killed(growing, _there(root, "train/*/step-*"))  # in the first training
    code, first = _retrain(growing)
    assert (code, first["outcome"], champion()) == (0, "promoted", "1")

    growing.add("feb", 16, shade=60)  # another stain
    _killed(growing, _there(root, "release/decisions/*/evidence.json"))  # before the decision is whole
    assert champion() == "1"
    code, second = _retrain(growing)
    assert (code, second["outcome"], champion()) == (4, "held", "1")
    assert any("new slides are unlike those of before" in why for why in second["why"])
    approve(config, second["version"], "ada", None)
    assert champion() == second["version"]

    growing.add("mar", 12, broken=5)
    _killed(growing, _there(root, "release/history/quarter/*.json"))  # the act is written, and no alias has moved
    assert status(config)["champion"] == second["version"]
    code, third = _retrain(growing)
    assert (code, third["outcome"]) == (4, "held")
    assert any("of the slides could not be read" in why for why in third["why"])
    assert champion() == second["version"]

    growing.rows = [row for row in growing.rows if not row[0].startswith("mar-0")]
    growing.add("apr", 60, flipped=True)
    code, fourth = _retrain(growing, "gate.drift=null")
    assert (code, fourth["outcome"], champion()) == (4, "rejected", second["version"])

    code, nothing = _retrain(growing, "gate.drift=null")
    assert (code, nothing["outcome"]) == (0, "nothing to do")
    code, late = _retrain(growing, "gate.drift=null", "retrain.expect_new_within=1s")
    assert (code, late["outcome"]) == (6, "overdue")

    kinds = [act.kind for act in acts(str(root), "quarter")]
    assert kinds[:3] == ["promote", "hold", "approve"]
    assert kinds[-1] == "reject"
    assert set(kinds[3:-1]) == {"hold"}
    last = last_act(str(root), "quarter")
    assert last is not None
    assert last.champion == champion()
    assert status(config)["agrees"]
    for act in acts(str(root), "quarter"):
        if act.decision is not None:
            folder = decision_folder(str(root), act.decision)
            assert replay(f"{folder}/decision.json")[1] is None
            assert Path(folder, "gate.html").is_file()
    latest = json.loads((root / "release" / "latest.json").read_text())
    assert (latest["outcome"], latest["exit_code"]) == ("overdue", 6)
