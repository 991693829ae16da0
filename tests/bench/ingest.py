"""Ray's share of the tile stage: `python -m tests.bench.ingest`.

A cohort of one slide that many tasks share and others that share tasks is tiled on two CPUs. Every worker writes down
when it begins and ends our work; whatever else the two slots did between the first beginning and the stage's end is
Ray's: scheduling, moving rows, waiting for the other slot at the end. Work that other programs slow down is slowed
down on both sides, so the share can be measured on a busy machine. Starting Ray and its workers is reported apart.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.ingest import graph
from tests.bench.canvas import repeat, write_canvas
from tests.conftest import SHARED_DATA

SLOTS = 2
GOAL = 0.10
MIN_WORK_S = 120.0
SPEC = TilingConfig(overlap_px=16, tissue="none")  # a grid that is not the slide's own: every patch is encoded
NOTES = "IPS_BENCH_NOTES"  # folder of the workers' notes


def note_work() -> None:
    """Run in each Ray worker when it starts: its pieces of work are timed from then on."""
    original: Callable[..., Any] = graph._attempted

    @functools.wraps(original)
    def timed(*arguments: Any) -> Any:
        began, cpu = time.time(), time.process_time()
        try:
            return original(*arguments)
        finally:
            line = json.dumps([began, time.time(), time.process_time() - cpu])
            with Path(os.environ[NOTES], str(os.getpid())).open("a") as file:
                file.write(line + "\n")

    graph._attempted = timed  # type: ignore[assignment]


def write_cohort(folder: Path, large: int, small: int) -> list[CohortSlide]:
    """One slide of `large` x `large` canvases of 2,601 patches, and `small` of one canvas each."""
    canvas = write_canvas(folder / "canvas.tiff")
    paths = [repeat(canvas, folder / "large.tiff", large, large)]
    paths += [repeat(canvas, folder / f"small-{i}.tiff", 1, 1, salt=i + 1) for i in range(small)]
    canvas.unlink()
    return [CohortSlide(path.stem, str(path), path.stem, None, None, {}, {}) for path in paths]


def measure(slides: list[CohortSlide], folder: Path) -> dict[str, float]:
    """Tile the cohort on Ray; seconds of wall, work and start-up, and what was tiled."""
    import ray

    notes = folder / "notes"
    notes.mkdir()
    os.environ.update({NOTES: str(notes), "RAY_AUTH_MODE": "disabled", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"})
    started = time.time()
    ray.init(
        address="local",
        num_cpus=SLOTS,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {NOTES: str(notes)}, "worker_process_setup_hook": note_work},
    )
    called = time.time()
    statuses = graph.tile_cohort(slides, SPEC, str(folder / "store"), cpus=1, on_status=lambda status: None)
    ended = time.time()
    ray.shutdown()
    assert all(status.status == "committed" for status in statuses), [status.reason for status in statuses]
    pieces = [json.loads(line) for file in notes.iterdir() for line in file.read_text().splitlines()]
    first = min(began for began, _, _ in pieces)
    return {
        "ray_start_s": called - started,
        "first_work_after_s": first - called,
        "wall_s": ended - first,
        "work_s": sum(end - began for began, end, _ in pieces),
        "work_cpu_s": sum(cpu for _, _, cpu in pieces),
        "pieces": float(len(pieces)),
        "patches": float(sum(status.n_patches for status in statuses)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", type=int, default=10, help="canvases along an edge of the large slide")
    parser.add_argument("--small", type=int, default=12, help="slides of one canvas")
    options = parser.parse_args()
    if not SHARED_DATA.is_dir():
        print(f"no real slides at {SHARED_DATA}")
        return 1
    folder = Path(tempfile.mkdtemp(prefix="ips-bench-ingest-"))
    try:
        slides = write_cohort(folder, options.large, options.small)
        found = measure(slides, folder)
    finally:
        shutil.rmtree(folder)
    share = 1 - found["work_s"] / (SLOTS * found["wall_s"])
    for name, value in found.items():
        print(f"  {name:22s} {value:10.1f}")
    enough = found["work_s"] >= MIN_WORK_S
    met = share <= GOAL and enough
    print(f"{'met   ' if met else 'MISSED'}  Ray's share: {share:.1%}, goal {GOAL:.0%} of at least {MIN_WORK_S:g} s")
    print(json.dumps({**found, "slots": SLOTS, "share": share, "goal": GOAL, "met": met}))
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
