from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.telemetry import METRICS, Laps, add, count, drain, level, note, seconds, spending
from tests.pipeline.jobs.head import serve_head, wait_for
from tests.processes import free_port


@pytest.fixture(autouse=True)
def _empty() -> None:
    drain()


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass, in s, which stands still else."""
    now = [1000.0]
    monkeypatch.setattr("pipeline.telemetry.time.perf_counter", lambda: now[0])

    def passing(seconds: float) -> None:
        now[0] += seconds

    return passing


def test_work_inside_other_work_counts_once(passing: Callable[[float], None]) -> None:
    with spending("decode"):
        passing(3)
        with spending("read"):
            passing(5)
        with spending("read"):
            passing(2)
    assert seconds(drain()) == {"read": 7, "decode": 3}
    assert drain() == {}


def test_laps_are_told_at_the_end_without_what_others_counted(passing: Callable[[float], None]) -> None:
    with spending("write"), Laps() as laps:
        for _ in range(2):
            passing(3)  # of a consumer's, between two items
            laps.start()
            passing(2)
            with spending("read"):
                passing(5)
            laps.lap("decode")
            passing(1)
            laps.lap("encode")
        assert set(drain()) == {"seconds.read"}
    assert seconds(drain()) == {"decode": 4, "encode": 2, "write": 6}


def test_threads_add_up_and_what_fails_is_counted_too() -> None:
    def work() -> None:
        with spending("decode"):
            time.sleep(0.05)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(ZeroDivisionError), spending("write"):
        _ = 1 / 0
    found = drain()
    assert 0.14 < found["seconds.decode"] < 1.0
    assert "seconds.write" in found


def test_another_process_s_sums_are_added() -> None:
    note("bytes.read", 7)
    add({"bytes.read": 100.0, "seconds.read": 2.0})
    assert drain() == {"bytes.read": 107.0, "seconds.read": 2.0}


def test_outside_of_ray_nothing_is_offered_and_nothing_fails() -> None:
    count("ips_patches_total", 3, stage="tile")
    level("ips_epoch", 1)


def test_the_readme_lists_every_metric_and_no_other() -> None:
    text = (Path(__file__).resolve().parents[2] / "pipeline" / "jobs" / "README.md").read_text()
    assert set(re.findall(r"`(ips_\w+)`", text)) == set(METRICS)


def test_timing_costs_little() -> None:
    """Some 1 us; a chunk that is decoded takes milliseconds."""
    began = time.process_time()
    for _ in range(2000):
        with spending("encode"):
            pass
    assert (time.process_time() - began) / 2000 < 50e-6


_DASHBOARD = Path(__file__).resolve().parents[2] / "conf" / "deploy" / "grafana.json"
_WORK = """
import time, ray
from pipeline.telemetry import METRICS, count, level
ray.init(log_to_driver=False)  # where RAY_ADDRESS says
for number in range(1000):  # until it is killed
    for name, metric in METRICS.items():
        tags = dict.fromkeys(metric.tags, "x")
        count(name, 2.0, **tags) if metric.form == "Counter" else level(name, float(number), **tags)
    time.sleep(0.5)
"""


def _expressions() -> list[str]:
    panels = json.loads(_DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_the_dashboard_draws_every_metric_and_no_other() -> None:
    assert {name for text in _expressions() for name in re.findall(r"ray_(ips_\w+)", text)} == set(METRICS)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(180)
def test_prometheus_answers_the_dashboard_s_queries(tmp_path: Path) -> None:
    """From a real head's exporter; the queries where Prometheus itself is installed."""
    with serve_head() as head:
        exporter = f"127.0.0.1:{head.metrics_port}"
        wait_for(f"http://{exporter}/metrics", 60)  # a process that comes before its node's agent offers nothing at all
        work = subprocess.Popen([sys.executable, "-c", _WORK], env={**head.env, "RAY_ADDRESS": head.gcs})
        try:
            with _prometheus(exporter, tmp_path) as address:
                offered: set[str] = set()
                while offered != set(METRICS):  # until pytest's own limit: a node tells of new ones in seconds
                    assert work.poll() is None
                    text = wait_for(f"http://{exporter}/metrics", 30)
                    offered = set(re.findall(r"^ray_(ips_\w+)\{", text, re.MULTILINE))
                    time.sleep(0.5)
                if address is None:
                    pytest.skip("Prometheus is not installed: the metrics are offered, the queries were not tried")
                time.sleep(25)  # a process reports every 10 s, and a rate needs two reports
                for expression in _expressions():
                    query = urllib.parse.urlencode({"query": expression.replace("$__rate_interval", "1m")})
                    found = json.loads(wait_for(f"{address}/api/v1/query?{query}", 10))["data"]["result"]
                    assert found, expression
                    assert all(math.isfinite(float(one["value"][1])) for one in found), expression
        finally:
            work.kill()
            work.wait()


@contextmanager
def _prometheus(exporter: str, folder: Path) -> Iterator[str | None]:
    """Prometheus on an exporter, a look a second; None where it is not installed."""
    program = shutil.which("prometheus")
    if program is None:
        yield None
        return
    jobs = [{"job_name": "ray", "static_configs": [{"targets": [exporter]}]}]
    (folder / "prometheus.yml").write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
    address = f"127.0.0.1:{free_port()}"
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        wait_for(f"http://{address}/-/ready", 30)
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()
