"""What a schedule costs that finds nothing new: `python -m tests.bench.retrain`; a minute, --large 5.

- `retrain` on a cohort that did not change, as a program of its own, on a disk and behind a proxy that counts what an
  S3 server is asked: wall time, CPU time, peak memory, requests that list. Goals: 10 s, 300 MB, one request for 500
  slides; with --large also 100,000 slides on a disk, in 60 s.
- With --new: one new slide among 10,000 that are tiled, against the same slide alone. Goal: 15 s more. The slides are
  small, each of a content of its own, and packed; what is measured is how they are looked up.

Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.compose import load_config
from pipeline.release.arrivals import Seen, look, remember
from pipeline.workflow.run import run
from tests.faults import faulty_s3
from tests.pipeline.small import write_slide
from tests.s3 import serve_s3

SLIDES, LARGE = 10_000, 100_000
SECONDS, LARGE_SECONDS, MEGABYTES, PER_REQUEST, MORE_SECONDS = 10.0, 60.0, 300.0, 500, 15.0


@dataclass(frozen=True)
class Cost:
    """Of one program."""

    wall_s: float
    cpu_s: float
    memory_mb: float


def main() -> int:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--new", action="store_true")
    asked = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for count, most in ((SLIDES, SECONDS), *([(LARGE, LARGE_SECONDS)] if asked.large else [])):
            cost = on_disk(folder / str(count), count)
            print(f"{count:,} slides on a disk: {_told(cost)}")
            missed += [f"{count:,} slides"] if cost.wall_s > most else []
            missed += ["memory"] if count == SLIDES and cost.memory_mb > MEGABYTES else []
        cost, requests = on_s3(folder / "s3", SLIDES)
        print(f"{SLIDES:,} slides on S3: {_told(cost)}, {requests} requests")
        missed += ["requests"] if requests > SLIDES / PER_REQUEST else []
        if asked.new:
            alone, among = one_new(folder / "one", 1), one_new(folder / "many", SLIDES)
            print(f"one new slide: {alone:.1f} s alone, {among:.1f} s among {SLIDES:,}")
            missed += ["one new slide"] if among - alone > MORE_SECONDS else []
    print(f"missed: {', '.join(missed)}" if missed else "all goals are met")
    return int(bool(missed))


def _told(cost: Cost) -> str:
    return f"{cost.wall_s:.1f} s, {cost.cpu_s:.1f} s of CPU, {cost.memory_mb:.0f} MB"


def _rows(names: list[str], folder: str) -> str:
    lines = [f"{name},{folder}/{name}.svs,p{n % (len(names) // 2 + 1)},{n % 2}" for n, name in enumerate(names)]
    return "\n".join(["slide_id,uri,patient_id,label", *lines]) + "\n"


def _overrides(cohort: str, root: str) -> list[str]:
    return [f"cohort.uri={cohort}", f"storage.root={root}", "gate.approval=true", "name=bench"]


def on_disk(folder: Path, count: int) -> Cost:
    """A cohort of so many files in 20 folders."""
    names = [f"d{n % 20:02d}/slide-{n:06d}" for n in range(count)]
    for number in range(20):
        (folder / "slides" / f"d{number:02d}").mkdir(parents=True)
    for name in names:
        (folder / "slides" / f"{name}.svs").write_bytes(b"")
    (folder / "cohort.csv").write_text(_rows(names, "slides"))
    return _nothing_new(_overrides(str(folder / "cohort.csv"), str(folder / "root")))


def on_s3(folder: Path, count: int) -> tuple[Cost, int]:
    """The same in a bucket, and how often the server was asked for anything but the cohort and what is kept."""
    names = [f"slide-{n:06d}" for n in range(count)]
    (folder / "slides" / "of").mkdir(parents=True)
    for name in names:
        (folder / "slides" / "of" / f"{name}.svs").write_bytes(b"x")
    (folder / "cohort.csv").write_text(_rows(names, "s3://slides/of"))
    with serve_s3(folder) as server, faulty_s3(server.endpoint) as faults:
        os.environ.update({**server.env, "AWS_ENDPOINT_URL": faults.endpoint})
        overrides = _overrides(str(folder / "cohort.csv"), str(folder / "root"))
        cost = _nothing_new(overrides, before=faults.seen.clear)
        return cost, len(faults.seen)


def _nothing_new(overrides: list[str], before: object = None) -> Cost:
    config = load_config("default", overrides)
    found = look(config)
    remember(config.storage.root, Seen(found.digest, time.time(), time.time(), "promoted", None, found.rows), {})
    if callable(before):
        before()
    began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    program = f"{_PEAK}\nfrom pipeline.cli.main import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", program, "retrain", "--json", *overrides], capture_output=True, text=True, check=True
    )
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(done.stdout)["outcome"] == "nothing to do", done.stdout
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return Cost(wall, cpu, float(done.stderr.splitlines()[-1]) / 1024)


_PEAK = """
import atexit, re, sys
from pathlib import Path
def peak():
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1], file=sys.stderr)
atexit.register(peak)
"""


def one_new(folder: Path, count: int) -> float:
    """Seconds of the tile stage for one more slide than so many."""
    (folder / "slides").mkdir(parents=True)
    write_slide(folder / "first.png", 0)
    names = [f"slide-{n:06d}" for n in range(count)]
    image = (folder / "first.png").read_bytes()
    for name in names:
        (folder / "slides" / f"{name}.svs").write_bytes(image + name.encode())  # another content, the same picture
    overrides = [
        *_overrides(str(folder / "cohort.csv"), str(folder / "root")),
        "tiling=image",
        "tiling.patch_px=32",
    ]
    (folder / "cohort.csv").write_text(_rows(names, "slides"))
    run(load_config("default", overrides), "tile")
    write_slide(folder / "new.png", 1)
    (folder / "new.png").rename(folder / "slides" / "new.svs")
    (folder / "cohort.csv").write_text(_rows([*names, "new"], "slides"))
    began = time.monotonic()
    run(load_config("default", overrides), "tile")
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
