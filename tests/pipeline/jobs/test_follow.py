from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.dashboard.modules.job.common import JobStatus
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType

from pipeline.jobs.client import Client, connect
from pipeline.jobs.follow import STOPPED, UNKNOWN, Job, code_of, follow
from pipeline.jobs.package import look_at
from pipeline.jobs.submit import Order, submit
from tests.pipeline.jobs.head import Head, line_to, serve_head

_LINES = 30
_SCRIPT = f"""
import sys, time
from pipeline.jobs.record import recorded
with recorded():
    for number in range({_LINES}):
        print("line", number, flush=True)
        time.sleep(0.3)
    sys.exit(3)
"""


def _details(status: str, code: int | None = None) -> JobDetails:
    return JobDetails(type=JobType.SUBMISSION, status=JobStatus(status), entrypoint="x", driver_exit_code=code)


@pytest.mark.parametrize(
    ("details", "code"),
    [
        (_details("SUCCEEDED", 0), 0),
        (_details("FAILED", 3), 3),
        (_details("FAILED", -9), 137),
        (_details("FAILED"), 1),
        (_details("STOPPED"), STOPPED),
        (_details("STOPPED", 0), STOPPED),
    ],
)
def test_a_final_state_has_a_code_of_its_own(details: JobDetails, code: int) -> None:
    assert code_of(details) == code


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with serve_head() as made:
        yield made


def _order(folder: Path, name: str) -> Order:
    work = folder / "work"
    work.mkdir(exist_ok=True)
    (work / "job.py").write_text(_SCRIPT)
    return Order(name, "python job.py", look_at(work, 1.0, {}), {}, str(folder / "root"))


def _begun(client: Client, order: Order) -> Job:
    job, begun = submit(client, order)
    assert begun
    return job


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_cut_line_loses_no_line_and_no_code(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with line_to(head.address) as line:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
        client, order = connect(line.address), _order(tmp_path, "cut")
        job = _begun(client, order)
        again, begun = submit(client, order)
        assert (again, begun) == (job, False)  # the same order is the same job
        shown: list[str] = []

        def show(text: str) -> None:
            shown.append(text)
            if "line 8\n" in text:
                line.cut()
                threading.Timer(3.0, line.mend).start()

        ended = follow(client, job, show, 60)
    numbers = [int(number) for number in re.findall(r"^line (\d+)$", "".join(shown), re.MULTILINE)]
    assert numbers == list(range(_LINES))
    assert (ended.code, ended.state, ended.source) == (3, "FAILED", "record")
    later, begun = submit(connect(head.address), order)
    assert (later.submission_id, begun) == ("cut-2", True)  # what has ended may be begun again


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_lost_server_costs_no_code_and_a_lost_head_is_said_to_be_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with serve_head() as own:
        client = connect(own.address)
        job = _begun(client, _order(tmp_path, "server"))
        ended: list[Any] = []
        watcher = threading.Thread(target=lambda: ended.append(follow(client, job, lambda _text: None, 60)))
        watcher.start()
        time.sleep(6)
        own.kill_dashboard()
        watcher.join(60)
        assert (ended[0].code, ended[0].state, ended[0].source) == (3, "LOST", "record")
    with serve_head() as own:
        client = connect(own.address)
        job = _begun(client, _order(tmp_path, "head"))
        time.sleep(4)
        own.kill()
        last = follow(client, job, lambda _text: None, 6)
    assert (last.code, last.source) == (UNKNOWN, "nobody")
    assert "submit again" in last.reason
