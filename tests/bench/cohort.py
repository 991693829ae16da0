"""How a cohort's cost grows: `python -m tests.bench.cohort --sizes 1000 10000 100000`, in minutes; --s3 takes longer.

For each size a store in which every slide is committed: one slide is tiled, its folder and its rows of the catalogue
are cloned, and the cohort's files are hard links of its file; with --packed it is in a pack, and the rows alone are
cloned, as of a million small images. Then, each in a process of its own:

- *known*: the tile stage of a cohort that the store knows and no stage recorded, which writes page, ledgers and record
- *nothing*: the same command again
- *plan*: what would be done
- *one more*: a slide is added

With --first the cohort is of as many small images of different content and an empty store: *first* tiles all of them.

CPU seconds and largest memory of that process and those that it starts; with --s3 also requests by kind, counted at a
proxy before a real server, but for listings, which the proxy answers (`tests.listings`). A straight line is fitted
through the sizes: what a slide costs. JSON as the last line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from pipeline.cohort.table import CohortSlide
from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.ingest.group import Group
from pipeline.ingest.tiler import ReadSlide, read_slide, store_slide
from pipeline.storage.files import SourceVersion
from pipeline.store.catalogue import Catalogue, Row
from pipeline.store.patches import PatchStore, SlideStatus
from pipeline.store.rows import slide_row, source_row
from tests.faults import faulty_s3
from tests.listings import Listings
from tests.s3 import serve_s3
from tests.synth import tissue_rgb

EDGE = 512  # px of an image
LINKS = 30_000  # hard links of one file; ext4 allows 65,000
FILE_ROWS = 50_000  # rows of a file of the cloned catalogue
REAL = 1000  # slides at both ends whose whole folder is cloned; of the others what tells that they are there
BUCKET = "bench"
STEPS = ("known", "nothing", "plan", "one more")
Fresh = Callable[[], list[Any]]
"""Forgets the requests that came, and gives the list of those to come."""


@dataclass(frozen=True)
class Cost:
    """Of one command."""

    step: str
    slides: int
    wall_s: float
    cpu_s: float
    peak_mb: float
    requests: dict[str, int]
    objects: int = 0
    """That a first tiling left below the root."""


@dataclass(frozen=True)
class Place:
    """Where a study lies: on the disk, and as commands name it."""

    folder: Path
    uri: str

    @property
    def tracking(self) -> str:
        return f"sqlite:///{self.folder.parent / 'mlflow.db'}"

    def overrides(self) -> list[str]:
        return [
            f"cohort.uri={self.uri}/cohort.csv",
            f"storage.root={self.uri}/root",
            f"tracking.uri={self.tracking}",
            "tiling=image",
            "tiling.patch_px=256",
        ]


def write_study(place: Place, count: int, *, packed: bool = False) -> None:
    """A cohort all of whose slides are committed, each in a folder of its own or all in one pack."""
    (place.folder / "slides").mkdir(parents=True)
    Image.fromarray(tissue_rgb(EDGE, EDGE)).save(place.folder / "first.jpg", quality=85)
    config = load_config("default", Place(place.folder, str(place.folder)).overrides())
    assert config.storage.patches is not None
    first = CohortSlide("first", str(place.folder / "first.jpg"), "p", None, None, {}, {})
    store = PatchStore(config.storage.patches, config.tiling.fingerprint())
    status = _in_a_pack(first, config, store) if packed else store_slide(first, config.tiling, config.storage.patches)
    assert status.key is not None, status.error
    store.look_again()
    facts = store.facts(status.key)
    (known,) = store.view.slides.to_pylist()
    shutil.rmtree(Path(store.catalogue.uri))
    rows: list[Row] = []
    for number, (slide, version) in enumerate(_cloned(place, count)):
        key = hashlib.sha256(slide.slide_id.encode()).hexdigest()[:32]
        if not packed:
            _clone_folder(Path(store.uri), status.key, key, whole=number < REAL or number >= count - REAL)
        rows.append(source_row(slide, version, {**asdict(status), "key": key}, None))
        rows.append(slide_row({**facts, "key": key}, known["pack"], known["place"]))
        if len(rows) >= FILE_ROWS:
            Catalogue(store.uri).append(rows)
            rows = []
    Catalogue(store.uri).append(rows)
    if not packed:
        shutil.rmtree(Path(store.uri, status.key))
    write_cohort(place, count)


def _in_a_pack(slide: CohortSlide, config: Config, store: PatchStore) -> SlideStatus:
    """Tile a slide as a task does that has others to put beside it."""
    assert config.storage.patches is not None
    read, _ = read_slide(slide, Path(slide.uri).stat().st_size, config.tiling, config.storage.patches)
    assert isinstance(read, ReadSlide)
    group = Group(store, np.empty(0, "S32"))
    group.add(0, read)
    ((_, status),) = group.commit()
    return status


def _cloned(place: Place, count: int) -> Iterator[tuple[CohortSlide, SourceVersion]]:
    etag = hashlib.md5((place.folder / "first.jpg").read_bytes(), usedforsecurity=False).hexdigest()
    original = place.folder / "first.jpg"
    for number in range(count):
        if number % LINKS == 0:
            original = Path(shutil.copy(original, place.folder / f"original-{number}.jpg"))
        path = place.folder / "slides" / f"{number:07d}.jpg"
        path.hardlink_to(original)
        found = path.stat()
        remote = place.uri.startswith("s3://")
        version = SourceVersion(found.st_size, etag if remote else None, None if remote else found.st_mtime)
        yield CohortSlide(path.stem, f"{place.uri}/slides/{path.name}", "p", None, None, {}, {}), version


def _clone_folder(store: Path, first: str, key: str, *, whole: bool) -> None:
    (store / key).mkdir()
    for path in (store / first).iterdir():
        if whole:
            shutil.copy(path, store / key)
    if not whole:
        (store / key / "slide.json").touch()  # no look reads it: what it says stands in the catalogue


def write_cohort(place: Place, count: int) -> None:
    """As CSV; the last of its slides need not be stored."""
    lines = [f"{number:07d},slides/{number:07d}.jpg,{number // 2},{number % 2}" for number in range(count)]
    (place.folder / "cohort.csv").write_text("\n".join(["slide_id,uri,patient_id,label", *lines]) + "\n")


def measured(step: str, count: int, place: Place, env: Mapping[str, str], fresh: Fresh) -> Cost:
    """Run one command in a process of its own."""
    command = ["-m", "pipeline", "plan" if step == "plan" else "tile", *place.overrides(), "--json"]
    return cost_of(command, step, count, env, fresh)


def cost_of(arguments: Sequence[str], step: str, count: int, env: Mapping[str, str], fresh: Fresh) -> Cost:
    """Of a Python with these arguments, in a process of its own."""
    seen = fresh()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    wrapped = [sys.executable, "-c", _PEAK, sys.executable, *arguments]
    done = subprocess.run(wrapped, env=dict(env), capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{step}: {done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = int(done.stderr.rpartition("peak ")[2]) / 1024
    cost = Cost(step, count, time.monotonic() - began, cpu, peak, dict(Counter(_kind(*one[:2]) for one in seen)))
    print(cost, file=sys.stderr, flush=True)
    return cost


_PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(done.returncode)
"""


def _kind(method: str, path: str) -> str:
    return "LIST" if method == "GET" and "list-type=2" in urlsplit(path).query else method


def study(count: int, steps: Sequence[str], *, s3: bool, packed: bool) -> list[Cost]:
    """These commands on one cohort, in their order."""
    with tempfile.TemporaryDirectory() as scratch, placed(Path(scratch), s3=s3) as (place, env, fresh):
        write_study(place, count, packed=packed)
        costs = [measured(step, count, place, env, fresh) for step in STEPS[:-1] if step in steps]
        if STEPS[-1] not in steps:
            return costs
        Image.fromarray(tissue_rgb(EDGE, EDGE, seed=9)).save(place.folder / "slides" / f"{count:07d}.jpg")
        write_cohort(place, count + 1)
        return [*costs, measured(STEPS[-1], count, place, env, fresh)]


def first_study(count: int, *, s3: bool) -> list[Cost]:
    """The whole command on images that no store knows; they differ in a comment, so in content."""
    with tempfile.TemporaryDirectory() as scratch, placed(Path(scratch), s3=s3) as (place, env, fresh):
        (place.folder / "slides").mkdir(parents=True)
        picture = Image.fromarray(tissue_rgb(EDGE, EDGE))
        for number in range(count):
            picture.save(place.folder / "slides" / f"{number:07d}.jpg", quality=85, comment=f"{number}".encode())
        write_cohort(place, count)
        cost = measured("first", count, place, env, fresh)
        return [replace(cost, objects=sum(path.is_file() for path in (place.folder / "root").rglob("*")))]


@contextmanager
def placed(scratch: Path, *, s3: bool) -> Iterator[tuple[Place, dict[str, str], Fresh]]:
    """Where a study lies, the environment of its commands, and their requests."""
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "MLFLOW_DISABLE_TELEMETRY": "true"}
    if not s3:
        yield Place(scratch / BUCKET, str(scratch / BUCKET)), env, list
        return
    with serve_s3(scratch / "s3") as server, faulty_s3(server.endpoint) as faults:
        server.bucket(BUCKET)

        def fresh() -> list[Any]:
            faults.instead = Listings(server.folder).answer  # what lies there was written past the server
            faults.seen.clear()
            return faults.seen

        env |= {**server.env, "AWS_ENDPOINT_URL": faults.endpoint}
        yield Place(scratch / "s3" / BUCKET, f"s3://{BUCKET}"), env, fresh


def report(costs: Sequence[Cost]) -> str:
    """A table, and what a slide costs where there are several sizes."""
    lines = ["| step | slides | CPU s | wall s | peak MB | requests | objects |", "|---|---|---|---|---|---|---|"]
    for cost in costs:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(cost.requests.items()))
        total = f"{sum(cost.requests.values())} ({kinds})" if kinds else ""
        resources = f"{cost.cpu_s:.1f} | {cost.wall_s:.1f} | {cost.peak_mb:.0f}"
        lines.append(f"| {cost.step} | {cost.slides:,} | {resources} | {total} | {cost.objects or ''} |")
    sizes = sorted({cost.slides for cost in costs})
    if len(sizes) > 1:
        for step in dict.fromkeys(cost.step for cost in costs):
            those = [cost for cost in costs if cost.step == step]
            x = [cost.slides for cost in those]
            cpu, base = np.polyfit(x, [cost.cpu_s for cost in those], 1)
            memory, _ = np.polyfit(x, [cost.peak_mb for cost in those], 1)
            asked, _ = np.polyfit(x, [sum(cost.requests.values()) for cost in those], 1)
            lines.append(
                f"{step}: {base:.1f} s and {cpu * 1e3:.3f} ms, {memory * 1024:.2f} KB, {asked:.4f} requests a slide"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, the fits and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--s3", action="store_true", help="on a real S3 server behind a counting proxy")
    parser.add_argument("--first", action="store_true", help="tile small images that no store knows")
    parser.add_argument("--packed", action="store_true", help="small images in packs")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="nothing and plan come after known")
    chosen = parser.parse_args(arguments)
    costs = [
        cost
        for size in chosen.sizes
        for cost in (
            first_study(size, s3=chosen.s3)
            if chosen.first
            else study(size, chosen.steps, s3=chosen.s3, packed=chosen.packed)
        )
    ]
    print(report(costs))
    print(json.dumps([asdict(cost) for cost in costs]))


if __name__ == "__main__":
    main()
