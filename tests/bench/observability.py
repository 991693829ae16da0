"""What it costs to know where time goes: the tile stage's work with and without its clocks, and a log line's bytes.

    python -m tests.bench.observability

Both are done in turn in one process, in CPU seconds; the ratio of the least of each is told, and what a thousand
quarantined slides would write.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import ray

from pipeline import telemetry
from pipeline.cluster import prepare_environment
from pipeline.cohort.table import CohortSlide
from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.demo.cohort import write_demo
from pipeline.ingest.tiler import store_slide
from pipeline.logs import JsonLines, within
from pipeline.workflow.run import load_cohort

TURNS = 9


class _Free:
    """As `spending`, and free."""

    def __init__(self, _kind: str) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        pass


class _FreeLaps(_Free):
    """As `Laps`, and free."""

    def __init__(self) -> None:
        pass

    def start(self) -> None:
        pass

    def lap(self, _kind: str) -> None:
        pass


def _cpu_seconds(config: Config, slides: Sequence[CohortSlide]) -> float:
    with tempfile.TemporaryDirectory() as store:
        began = time.process_time()
        for slide in slides:
            assert store_slide(slide, config.tiling, store).key is not None
        return time.process_time() - began


def clocks() -> float:
    """Ratio of CPU seconds with the clocks to those without."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("demo", [f"storage.root={folder}", "cohort.demo.slides=12"])
        assert config.cohort.demo is not None
        write_demo(str(Path(config.cohort.uri).parent), config.cohort.demo)
        slides = load_cohort(config, needs_labels=False).slides
        _cpu_seconds(config, slides)
        timed, free = [], []
        for _ in range(TURNS):
            timed.append(_cpu_seconds(config, slides))
            with ExitStack() as stack:
                for user in ("store.commit", "storage.ranges", "ingest.group"):
                    stack.enter_context(mock.patch(f"pipeline.{user}.spending", _Free))
                stack.enter_context(mock.patch("pipeline.tiling.cutting.Laps", _FreeLaps))
                free.append(_cpu_seconds(config, slides))
        return min(timed) / min(free)


def line_costs() -> tuple[float, int]:
    """CPU seconds of a JSON line, and bytes of a thousand."""
    record = logging.LogRecord(
        "pipeline", logging.WARNING, "f", 1, "tile: %s is quarantined: %s", ("s", "x" * 200), None
    )
    record.slide = "a-0001"
    lines = JsonLines()
    with within(run="0" * 32, stage="tile"):
        began = time.process_time()
        size = sum(len(lines.format(record)) + 1 for _ in range(20_000))
        seconds = time.process_time() - began
    return seconds / 20_000, size // 20


def metric_cost() -> float:
    """CPU seconds of this process for the three metrics that a slide's outcome is counted in, on a local Ray."""
    prepare_environment()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        began = time.process_time()
        for _ in range(5_000):
            telemetry.count("ips_slides_total", stage="tile", outcome="committed")
            telemetry.count("ips_patches_total", 4, stage="tile")
            telemetry.count("ips_patches_lost_total", 1, stage="tile")
        return (time.process_time() - began) / 5_000
    finally:
        ray.shutdown()


if __name__ == "__main__":
    a_line, size = line_costs()
    found = {"clocks": clocks(), "json_line_s": a_line, "bytes_of_1000_lines": size, "slide_metrics_s": metric_cost()}
    print(json.dumps(found, indent=2))
