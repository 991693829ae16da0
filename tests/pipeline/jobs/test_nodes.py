from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.jobs.nodes import Answer, examine_nodes, judged, probe
from tests.pipeline.small import small_config

_GOOD = Answer(
    host="n1",
    versions={"python": "3.11.9", "torch": "2.13.0", "ray": "2.60.0", "ips-pipeline": "0.1.0"},
    storage=None,
    tracking=None,
    gpus=1,
    shared=2**31,
    disk=10**11,
    files=65536,
    clock=0.0,
)


def _bad(answer: Answer, skew: float = 0.0, gpus: float = 1.0) -> dict[str, str]:
    others = [(f"n{number}", (_GOOD, 0.0, 1.0)) for number in (2, 3)]
    found = judged([("n1", (answer, skew, gpus)), *others])
    bad = [one for one in found if not one.ok]
    assert {one.node for one in bad} <= {"n1"}
    assert all(one.remedy for one in bad)
    return {one.name: one.found for one in bad}


def test_a_sound_cluster_has_no_finding() -> None:
    assert _bad(_GOOD) == {}


@pytest.mark.parametrize(
    ("answer", "name", "words"),
    [
        (replace(_GOOD, versions={**_GOOD.versions, "torch": "2.12.0"}), "versions", "torch 2.12.0 (others 2.13.0)"),
        (replace(_GOOD, storage="s3://b: access denied"), "storage", "s3://b: access denied"),
        (replace(_GOOD, tracking="MLflow at x: refused"), "mlflow", "MLflow at x: refused"),
        (replace(_GOOD, gpus=0), "gpus", "0 seen, 1 offered by Ray"),
        (replace(_GOOD, shared=64 * 2**20), "shm", "0.1 GiB of /dev/shm"),
        (replace(_GOOD, disk=3 * 10**9), "disk", "3 GB free"),
        (replace(_GOOD, files=1024), "files", "1024 open files"),
    ],
)
def test_each_fault_of_a_node_is_found(answer: Answer, name: str, words: str) -> None:
    assert _bad(answer) == {name: words}


def test_a_clock_that_is_off_and_a_node_that_is_silent() -> None:
    assert _bad(_GOOD, skew=7.0) == {"clock": "7.0 s off"}
    (found,) = judged([("n1", "ModuleNotFoundError: No module named 'pipeline'")])
    assert (found.ok, found.name) == (False, "answer")
    assert "same image" in found.remedy


def test_a_machine_without_gpus_needs_none() -> None:
    assert _bad(replace(_GOOD, gpus=0), gpus=0.0) == {}


def test_this_machine_tells_what_it_has(tmp_path: Path) -> None:
    answer = probe(str(tmp_path), None)
    assert answer.storage is None
    assert list(tmp_path.iterdir()) == []  # the probe is gone
    assert abs(answer.clock - time.time()) < 5
    assert answer.files > 0
    (tmp_path / "file").touch()
    assert "file" in str(probe(str(tmp_path / "file"), None).storage)


@pytest.mark.ray
@pytest.mark.slow
def test_every_node_of_a_real_ray_is_asked(ray_session: None, tmp_path: Path) -> None:
    found = examine_nodes(small_config(storage={"root": str(tmp_path)}))
    assert {one.name for one in found} == {"versions", "storage", "mlflow", "gpus", "shm", "disk", "clock", "files"}
    assert len({one.node for one in found}) == 1
    assert all(one.ok for one in found if one.name in ("versions", "storage", "mlflow", "gpus", "clock"))
