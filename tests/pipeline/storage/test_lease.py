from __future__ import annotations

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.storage import lease, s3
from pipeline.storage.lease import Claim, held
from tests.s3 import serve_s3

ELSEWHERE = Claim("t1", "node-7", "another-boot/4026531836", 77, 1e9, "2026-01-02T03:04:05+00:00", beats=3)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "stages" / "train-aa.lease")


def _write(uri: str, claim: Claim) -> None:
    Path(uri).parent.mkdir(exist_ok=True)
    Path(uri).with_suffix(".new").write_text(json.dumps(asdict(claim)))
    Path(uri).with_suffix(".new").replace(uri)


def _token(uri: str) -> str:
    return str(json.loads(Path(uri).read_text())["token"])


def _no_wait(_: float) -> None:
    raise AssertionError("nothing is to be waited for")


def test_a_second_one_is_told_who_holds_it_and_what_to_do(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.lease.time.sleep", _no_wait)
    named = rf"train of demo: process {os.getpid()} on {re.escape(socket.gethostname())}, since 20\d\d-.*"
    with held(uri, "train of demo") as mine:
        with (
            pytest.raises(StageError, match=named + rf"wait until it ends, or stop it \(kill {os.getpid()}\) and run"),
            held(uri, "train of demo"),
        ):
            pass
        pickle.loads(pickle.dumps(mine)).check()
        assert _token(uri) == mine.token
    with held(uri, "train of demo") as again:  # though the process of the first one lives
        assert again.token != mine.token


def test_who_gave_it_back_or_was_silent_through_all_of_another_s_work_writes_nothing_more(uri: str) -> None:
    with held(uri, "train") as first:
        first.check()
    with pytest.raises(StageError, match="the run that this process works for has ended"):
        first.check()
    with held(uri, "train") as second:
        second.check()
    with pytest.raises(StageError, match=rf"process {os.getpid()} .* has taken this work over .*has ended since"):
        first.check()


def test_a_claim_that_is_gone_is_looked_for_twice_and_then_lost(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some S3 servers remove the old file before they write the new one."""
    mine = lease.Lease(uri, "t1")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.storage.lease.time.sleep", lambda _: _write(uri, ELSEWHERE))
        mine.check()
    Path(uri).unlink()
    monkeypatch.setattr(lease, "_AGAIN_S", 0.01)
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    with pytest.raises(StageError, match=r"train-aa.lease is gone, .* run again where none is"):
        mine.check()
    with held(uri, "train"):
        Path(uri).unlink()
        _until(lambda: "is gone" in caplog.text)
    assert not Path(uri).exists()  # it is not claimed anew


KILLED = """
import os, signal, sys
from pipeline.storage.lease import held
with held(sys.argv[1], "train"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_on_this_machine_nothing_is_waited_for(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, uri]) as child:
        while not Path(uri).exists() or _state(child.pid) != "Z":  # dead, and nobody has asked for its exit code
            time.sleep(0.01)
        left = _token(uri)
        monkeypatch.setattr("pipeline.storage.lease.time.sleep", _no_wait)
        with held(uri, "train"):
            assert _token(uri) != left
    assert child.returncode == -signal.SIGKILL
    _write(uri, replace(ELSEWHERE, machine=lease._machine(), pid=child.pid))
    with held(uri, "train"):
        assert _token(uri) != "t1"


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_process_id_that_was_given_anew_is_another_process(uri: str) -> None:
    _write(uri, replace(ELSEWHERE, machine=lease._machine(), pid=os.getpid()))  # which began long after 2001
    with held(uri, "train"):
        assert _token(uri) != "t1"


def test_a_silent_one_elsewhere_is_taken_over(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert lease.SILENT_S <= 45  # a resume waits no longer
    assert lease.SILENT_S >= 6 * lease.BEAT_S  # and some beats may be lost
    monkeypatch.setattr(lease, "SILENT_S", 0.1)
    monkeypatch.setattr(lease, "_POLL_S", 0.02)
    _write(uri, ELSEWHERE)
    with held(uri, "train"):
        assert _token(uri) != "t1"
    assert "process 77 on node-7, since 2026-01-02T03:04:05+00:00, is silent; this run takes over" in caplog.text


@pytest.mark.parametrize("moves", ["beats", "is another", "ends"])
def test_one_elsewhere_that_lives_is_left_alone(moves: str, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its clock says: what counts is that the file changes."""
    polls = []

    def sleep(_: float) -> None:
        polls.append(1)
        if len(polls) == 3 and moves == "ends":
            _write(uri, replace(ELSEWHERE, free=True))
        elif len(polls) == 3:
            _write(uri, replace(ELSEWHERE, beats=4) if moves == "beats" else replace(ELSEWHERE, token="t2"))

    monkeypatch.setattr("pipeline.storage.lease.time.sleep", sleep)
    _write(uri, ELSEWHERE)
    if moves == "ends":
        with held(uri, "train"):
            assert len(polls) == 3
        return
    with pytest.raises(StageError, match="on node-7.* or stop it there and run again"), held(uri, "train"):
        pass
    assert len(polls) == 3
    assert Path(uri).exists()


def test_one_that_was_taken_for_dead_notices_and_leaves_the_other_alone(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    with held(uri, "train") as mine:
        mine.check()
        _until(lambda: json.loads(Path(uri).read_text())["beats"] > 2)
        lost = threading.Event()
        monkeypatch.setattr(lease.log, "error", lambda *_: lost.set())
        while not lost.wait(0.05):  # a beat that had looked before it was taken over wins
            _write(uri, ELSEWHERE)
        with pytest.raises(StageError, match="process 77 on node-7.* has taken this work over"):
            mine.check()
    assert _token(uri) == "t1"


def _until(is_so: object) -> None:
    assert callable(is_so)
    while not is_so():
        time.sleep(0.01)


def _beats(file: Path) -> int:
    """Zero while rclone, unlike S3, has removed the old file and not yet written the new one."""
    try:
        return int(json.loads(file.read_text())["beats"])
    except FileNotFoundError:
        return 0


@pytest.mark.timeout(60)
def test_on_s3_through_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ignores conditional writes will do, and beats that fail while it is away end nothing."""
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    monkeypatch.setattr(s3, "PATIENCE_S", 0.1)
    file = tmp_path / "s3" / "bucket" / "train.lease"
    with serve_s3(tmp_path / "s3") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        uri = server.bucket("bucket") + "/train.lease"
        away = threading.Event()
        monkeypatch.setattr(lease.log, "warning", lambda *_: away.set())
        stack = held(uri, "train")
        mine = stack.__enter__()
        with pytest.raises(StageError, match="is at work on it"), held(uri, "train"):
            pass
        server.kill()
        assert away.wait(30)
    with serve_s3(tmp_path / "s3", int(server.endpoint.rpartition(":")[2])):
        before = _beats(file)
        _until(lambda: _beats(file) > before)
        mine.check()
        stack.__exit__(None, None, None)
        assert json.loads(file.read_text())["free"]
