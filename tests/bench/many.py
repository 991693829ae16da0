"""Training on many small images: `python -m tests.bench.many --sizes 10000 100000 1000000`, half an hour on two cores.

For each size a store in which every image is committed: `PACKED` JPEGs of 512 px are tiled into one pack, whose file is
linked under as many names as are wanted, and the rows of the catalogue are cloned. Then, in a process of its own, what
a rank of a training does, part by part, with CPU seconds and what the process holds after it:

- *sources*: the handles of all images (`open_sources`), as the driver makes them
- *identity* of the stage, and what the model is to say that it has *seen*
- *digest*: of the plan, which stands in every checkpoint
- *sent*: the job pickled and read again, as the workers get it
- *slides*: the loop's view of them: sizes, targets, class weights
- *read*: patches of a shuffled epoch, read and decoded and nothing else, on one thread
- *to the first step*: everything that `train_steps` does before its first step is over
- *a step*: of the steps that follow, with the share in which they waited for patches

and, of two processes over gloo on a core each, what both get through together, over one. A straight line through the
sizes is what an image costs. JSON as the last line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from pipeline.bags.sources import LabelledSource, contents, open_sources
from pipeline.cohort.table import CohortSlide, read_cohort
from pipeline.columnar import choose_allocator
from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.model.build import build_model, build_optimizer
from pipeline.store.catalogue import Catalogue, Row
from pipeline.store.patches import PatchStore, StoredSlide
from pipeline.store.rows import slide_row
from pipeline.tracking.tracker import Tracker
from pipeline.training.hands import Slides
from pipeline.training.loop import train_steps
from pipeline.training.plan import epoch_batches, plan_digest
from pipeline.training.ranks import joined_ranks
from pipeline.training.session import Job, training_slides
from pipeline.workflow.stage import learned
from tests.bench import packs
from tests.gloo import one_of_two

PACKED = packs.GROUP  # images of a pack
FILE_ROWS = 50_000  # of a file of the cloned catalogue
READ = 4000  # images that are read in the order of an epoch, and nothing else
STEPS = 6  # that are timed, after the first


@dataclass(frozen=True)
class Part:
    """What one part of it took."""

    name: str
    images: int
    cpu_s: float
    wall_s: float
    held_mb: float
    """By the process, after it."""
    peak_mb: float
    """Of the process, until then."""
    waited: float = 0.0
    """Share of the wall time."""


def config(folder: Path) -> Config:
    """Four patches an image, of which two are kept; a ResNet-18 cut after two stages."""
    return Config.model_validate({
        "name": "many",
        "cohort": {"uri": str(folder / "cohort.csv")},
        "storage": {"root": str(folder / "root"), "patches": str(folder / "store")},
        "tasks": [{"name": "label", "column": "label", "classes": ["0", "1"]}],
        "tiling": packs.SPEC.model_dump(),
        "model": {"encoder": {"stages": 2}, "select": {"memory": 2, "chunk": 4}},
        "train": {"epochs": 10, "batch_size": 32, "warmup_epochs": 0},
    })  # fmt: skip


def write_store(folder: Path, count: int) -> None:
    """A cohort of `count` images in packs of `PACKED`."""
    (folder / "images").mkdir(parents=True)
    packs.images(folder / "images", PACKED)
    files = sorted((folder / "images").glob("*.jpg"))
    store = PatchStore(str(folder / "store"), packs.SPEC.fingerprint())
    packs.packed([CohortSlide(path.stem, str(path), "p", None, None, {}, {}) for path in files], str(folder / "store"))
    known = store.view.slides.to_pylist()
    facts = dict(store.all_facts([row["key"] for row in known]))
    (pack,) = (Path(store.uri) / "packs").iterdir()
    catalogue, rows = Catalogue(store.uri), list[Row]()
    for number in range(count):
        if number % PACKED == 0:
            name = f"pack-{hashlib.sha256(str(number).encode()).hexdigest()}.arrow"
            pack.with_name(name).hardlink_to(pack)
        row = known[number % PACKED]
        rows.append(slide_row({**facts[row["key"]], "key": key_of(number)}, name, row["place"]))
        if len(rows) == FILE_ROWS or number == count - 1:
            catalogue.append(rows)
            rows = []
    lines = (f"{number:07d},images/{number:07d}.jpg,{number // 2},train,{number % 2}\n" for number in range(count))
    with (folder / "cohort.csv").open("w") as file:
        file.write("slide_id,uri,patient_id,split,label\n")
        file.writelines(lines)


def key_of(number: int | str) -> str:
    """Of an image."""
    return hashlib.sha256(f"image {int(number)}".encode()).hexdigest()[:32]


class _Clock:
    """Collects parts."""

    def __init__(self, images: int) -> None:
        self.images, self.parts = images, list[Part]()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        held, peak = (int(status[name].split()[0]) / 2**10 for name in ("VmRSS", "VmHWM"))
        self.parts.append(Part(name, self.images, cpu, wall, held, peak))
        print(self.parts[-1], file=sys.stderr, flush=True)


def sources(folder: Path) -> tuple[Config, Sequence[LabelledSource]]:
    """As the stage has them."""
    settings = config(folder)
    cohort = read_cohort(str(settings.cohort.uri), settings.tasks)
    return settings, open_sources(settings, cohort.slides, {s.slide_id: key_of(s.slide_id) for s in cohort.slides})


def parts(folder: Path, count: int) -> list[Part]:
    """All of them, in this process."""
    choose_allocator()
    torch.set_num_threads(1)
    clock = _Clock(count)
    with clock.part("sources"):
        settings, found = sources(folder)
    with clock.part("identity"):  # of the stage
        fingerprint([[s.slide_id, s.patient_id, one.key, one.n_patches, s.labels] for s, one in found])
    with clock.part("seen"):  # what is told with the model
        learned(found)
        contents(settings, (source for _, source in found if isinstance(source, StoredSlide)))
    with clock.part("digest"):
        digest = plan_digest([s.key for _, s in found], [s.n_patches for _, s in found], "recipe")
    with clock.part("sent"):
        job = Job(settings, found, [], digest, str(folder / "train"), Tracker("-", "-"), "run")
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(job, protocol=5, buffer_callback=buffers.append)
        job = pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])
        del found, buffers, data
    with clock.part("slides"):
        slides = training_slides(job)
    order = [index for batch in epoch_batches(slides.sizes, batch_size=32, seed=0, epoch=0) for index in batch]
    with clock.part(f"{READ:,} read"):
        for index in order[:READ]:
            for _ in slides.bag(index, 0).chunks(4):
                pass
    steps = _steps(settings, slides)
    with clock.part("to the first step"):
        next(steps)
    with clock.part(f"{STEPS} steps"):
        done = list(islice(steps, STEPS))
    last = clock.parts[-1]
    clock.parts[-1] = replace(last, waited=sum(one.waited for one in done) / last.wall_s)
    return clock.parts


def _steps(settings: Config, slides: Slides) -> Iterator[Any]:
    torch.manual_seed(0)
    model = build_model(settings)
    optimizer, selecting = build_optimizer(model, settings.train), settings.model.select
    return train_steps(model, optimizer, slides, settings.train, selecting, seed=0, start_epoch=0, ranks=joined_ranks())


def _rank(rank: int, folder: str, world: int) -> None:
    """One of the processes that train together, on a core of its own; rank 0 writes seconds of the steps and waits."""
    choose_allocator()
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    with one_of_two(rank, folder) if world == 2 else nullcontext():
        torch.set_num_threads(1)
        settings, found = sources(Path(folder))
        slides = training_slides(Job(settings, found, [], "", "", Tracker("-", "-"), "run"))
        steps = _steps(settings, slides)
        next(steps)
        began = time.perf_counter()
        waited = sum(one.waited for one in islice(steps, STEPS))
        if rank == 0:
            Path(folder, "steps.json").write_text(json.dumps([time.perf_counter() - began, waited]))


def together(folder: Path, world: int) -> tuple[float, float]:
    """Images a second of so many processes, and the share in which the first of them waited for patches."""
    spawn(_rank, args=(str(folder), world), nprocs=world)  # type: ignore[no-untyped-call]
    seconds, waited = json.loads((folder / "steps.json").read_text())
    return STEPS * config(folder).train.batch_size / seconds, waited / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", action="store_true", help="also two processes against one; wants an idle machine")
    parser.add_argument("--in", type=Path, dest="folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps([asdict(part) for part in parts(options.folder, options.sizes[0])]))
        return
    found: list[dict[str, Any]] = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_store(folder, size)
            command = [sys.executable, "-m", "tests.bench.many", "--in", scratch, "--sizes", str(size)]
            found += json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            if options.workers:
                for world in (1, 2):
                    rate, waited = together(folder, world)
                    print(f"{size:,} images, {world} processes: {rate:.0f} images/s, waited {waited:.1%}", flush=True)
    print("| part | images | CPU s | wall s | held MB | peak MB | waited |\n|---|---|---|---|---|---|---|")
    for one in found:
        print(
            f"| {one['name']} | {one['images']:,} | {one['cpu_s']:.2f} | {one['wall_s']:.2f} | {one['held_mb']:.0f} | "
            f"{one['peak_mb']:.0f} | {one['waited']:.1%} |"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
