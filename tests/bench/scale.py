"""How training scales: `python -m tests.bench.scale`; 7 minutes on 2 idle cores, --quick 1.

- Two one-thread workers, a core each, against one one-thread worker on a core: the whole way from the patch store
  through decoding, selection, gradients and their sum over gloo, with slides of unequal size. Alternating epochs.
- The time of an epoch against its patches: a straight line is fitted, and its residuals looked at. All sizes by turns.

Workers are processes of their own, without Ray: its share is measured in `tests.bench.train`. A machine that does other
work should be measured with --cpu-time, which counts what a worker computes and not what it waits for. Exit code 1
when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.multiprocessing.spawn import spawn

from ips.bag import Bag
from pipeline.bags.augment import Augment
from pipeline.bags.patch_bag import PatchBag
from pipeline.cohort.table import CohortSlide
from pipeline.config.recipe import Config
from pipeline.ingest.tiler import store_slide
from pipeline.model.build import build_model, build_optimizer
from pipeline.store.patches import PatchStore, StoredSlide
from pipeline.training.hands import Slides
from pipeline.training.loop import StepDone, train_steps
from pipeline.training.ranks import joined_ranks

SPEEDUP, RESIDUAL = 1.8, 0.05
PATCH_PX, CELLS = 64, (20, 13)  # columns and rows of the slide that is listed again and again
BATCH = 8
SHARES = 2 * (3, 1, 1, 2, 1, 4, 1, 1)  # sizes of the slides, times 260 patches
LINE = (1, 2, 3, 4, 6)  # patches of an epoch, times 8 x 260


@dataclass(frozen=True)
class Epoch:
    """What one epoch took."""

    wall_s: float
    cpu_s: float
    """Of the busiest worker."""
    waited: float
    """Share of the time that rank 0 waited for patches."""


Seconds = Callable[[Epoch], float]
"""Of an epoch, by the clock that judges."""


def config() -> Config:
    """A ResNet-18 cut after two stages, M = 16, as the demo has it."""
    return Config.model_validate(
        {
            "name": "scale",
            "cohort": {"uri": "cohort.csv"},
            "tasks": [{"name": "label", "column": "label"}],
            "tiling": {"patch_px": PATCH_PX, "mpp": None, "tissue": "none"},
            "model": {"encoder": {"stages": 2}, "select": {"memory": 16, "chunk": 64}},
            "train": {"epochs": 1000, "batch_size": BATCH, "warmup_epochs": 0, "bounded": True, "norm": "frozen"},
        }
    )


def write_slide(folder: Path) -> StoredSlide:
    """One stored slide of coloured noise."""
    settings = config()
    height, width = CELLS[1] * PATCH_PX, CELLS[0] * PATCH_PX
    coarse = np.random.default_rng(0).integers(90, 230, (height // 8, width // 8, 3), np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / "slide.png")
    slide = CohortSlide("slide", str(folder / "slide.png"), "p", None, None, {}, {})
    status = store_slide(slide, settings.tiling, str(folder / "store"))
    assert status.key is not None, status.reason
    return PatchStore(str(folder / "store"), settings.tiling.fingerprint()).slide(status.key)


def slides(stored: StoredSlide, shares: Sequence[int]) -> Slides:
    """Slides that list the stored one so many times each."""

    def bag(index: int, epoch: int) -> Bag:
        return PatchBag([stored] * shares[index], threads=1, augment=Augment(0, epoch, ""))

    sizes = [share * stored.n_patches for share in shares]
    targets = [{"label": float(number % 2)} for number in range(len(shares))]
    return Slides(sizes, targets, {"label": "binary"}, bag)


def train(stored: StoredSlide, shares: Sequence[int], epochs: int) -> list[Epoch]:
    """One-thread training on one core of this process's rank; the first epoch warms up and is left out."""
    ranks = joined_ranks()
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[ranks.rank]})
    torch.set_num_threads(1)
    settings = config()
    torch.manual_seed(0)
    model = build_model(settings)
    steps = train_steps(
        model,
        build_optimizer(model, settings.train),
        slides(stored, shares),
        settings.train,
        settings.model.select,
        seed=0,
        start_epoch=0,
        ranks=ranks,
    )
    found: list[Epoch] = []
    taken: list[StepDone] = []
    cpu = time.process_time()
    for step in steps:
        taken.append(step)
        if not step.last_of_epoch:
            continue
        seconds = sum(done.seconds for done in taken)
        busiest = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
        if ranks.world_size > 1:
            dist.all_reduce(busiest, dist.ReduceOp.MAX)
        found.append(Epoch(seconds, float(busiest), sum(done.waited for done in taken) / seconds))
        taken, cpu = [], time.process_time()
        if len(found) == epochs + 1:
            break
    return found[1:]


def _worker(rank: int, folder: str, world: int, stored: StoredSlide, shares: Sequence[int], epochs: int) -> None:
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    found = train(stored, shares, epochs)
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        torch.save([vars(epoch) for epoch in found], f"{folder}/epochs.pt")


def measure(world: int, stored: StoredSlide, shares: Sequence[int], epochs: int) -> list[Epoch]:
    """Epochs of so many workers, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_worker, args=(folder, world, stored, shares, epochs), nprocs=world)  # type: ignore[no-untyped-call]
        return [Epoch(**found) for found in torch.load(f"{folder}/epochs.pt")]


def compare_workers(
    stored: StoredSlide, shares: Sequence[int], seconds: Seconds, repeats: int
) -> tuple[float, dict[str, object]]:
    """Speed-up of two workers over one, and the table."""
    runs: dict[int, list[Epoch]] = {1: [], 2: []}
    for _ in range(repeats):
        for world, epochs in runs.items():
            epochs += measure(world, stored, shares, epochs=1)
    best = {world: min(epochs, key=seconds) for world, epochs in runs.items()}
    patches = sum(shares) * stored.n_patches
    print(f"{len(shares)} slides, {patches} patches of {PATCH_PX} px, {BATCH} slides a step, one thread a worker")
    for world, epoch in best.items():
        print(
            f"  {world} worker{'s' * (world > 1):1s}  {patches / seconds(epoch):7.0f} patches/s   "
            f"wall {epoch.wall_s:6.2f} s   busiest CPU {epoch.cpu_s:6.2f} s   device_wait {epoch.waited:5.1%}"
        )
    return seconds(best[1]) / seconds(best[2]), {str(world): vars(epoch) for world, epoch in best.items()}


def fit_line(
    stored: StoredSlide, sizes: Sequence[int], seconds: Seconds, repeats: int
) -> tuple[float, dict[str, object]]:
    """Largest residual of a straight line through (patches, seconds of an epoch), relative to the line; the table."""
    patches = [BATCH * share * stored.n_patches for share in sizes]
    times = [math.inf] * len(sizes)
    for _ in range(repeats):
        found = [measure(1, stored, [share] * BATCH, epochs=1)[0] for share in sizes]
        times = list(map(min, times, map(seconds, found)))
    slope, offset = np.polyfit(patches, times, 1, w=1 / np.array(times))  # the residuals are relative too
    fitted = slope * np.array(patches) + offset
    residuals = (np.array(times) - fitted) / fitted
    print(f"\nepoch of {BATCH} slides: {offset:.2f} s + {1e6 * slope:.0f} us a patch")
    for n, taken, residual in zip(patches, times, residuals, strict=True):
        print(f"  {n:7d} patches  {taken:7.2f} s   residual {residual:+6.1%}")
    table = {"offset_s": offset, "us_per_patch": 1e6 * slope, "patches": patches, "seconds": times}
    return float(abs(residuals).max()), {**table, "residuals": residuals.tolist()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few patches, once: whether it runs, no figures")
    parser.add_argument(
        "--cpu-time", action="store_true", help="judge the CPU time of the busiest worker, not the wall"
    )
    options = parser.parse_args()
    seconds: Seconds = attrgetter("cpu_s" if options.cpu_time else "wall_s")
    shares, sizes, repeats = (SHARES[:BATCH], LINE[:3], 1) if options.quick else (SHARES, LINE, 3)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        stored = write_slide(Path(folder))
        speedup, workers = compare_workers(stored, shares, seconds, repeats)
        residual, line = fit_line(stored, sizes, seconds, max(1, repeats - 1))
    met = {"two workers": speedup >= SPEEDUP, "linear in patches": residual <= RESIDUAL}
    print(f"\n{'met   ' if met['two workers'] else 'MISSED'}  two workers: {speedup:.2f}x, goal {SPEEDUP:g}x")
    print(f"{'met   ' if met['linear in patches'] else 'MISSED'}  residual: {residual:.1%}, goal {RESIDUAL:.0%}")
    facts = {"clock": "cpu time" if options.cpu_time else "wall", "seconds": time.perf_counter() - began}
    outcome = {"speedup": speedup, "residual": residual, "met": met}
    print(json.dumps({**facts, "torch": torch.__version__, "workers": workers, "line": line, **outcome}))
    return int(not all(met.values()))


if __name__ == "__main__":
    sys.exit(main())
