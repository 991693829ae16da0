"""What training costs beside the training: `python -m tests.bench.train` (8 minutes on 2 idle cores; --quick: two).

1. An epoch on 200 slides under Ray Train and MLflow, as `pipeline train` runs it, against the bare loop on the same
   slides, in turns: bare, Ray, bare, Ray. The slides are eight made images, listed 25 times each, from the patch store.
2. A checkpoint of the demo model, from the copy to the commit, against that epoch.
3. Peak memory of a step of 16 images of 250,000 patches, from pixels: at M = 64 against 16 of 1,000, at M = 5,000
   against 16 of a few more than 5,000, for a smaller one has no 5,000 to keep. It is one image, listed 16 times. On a
   GPU: a made slide of 16.6 gigapixels, 253,440 patches of 256 px in the store (2 GB of scratch), and ResNet-18. That
   would take a CPU days, so it has an image of 64 megapixels, 250,000 patches of 16 px, and a pooling stub as encoder.
   With each step the shares of it that go to waiting, decoding, the way to the device and the encoder (`clocks`).

Every line of 3 and every loop of 1 is a process of its own. Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ips.bag import Bag
from ips.network.aggregator import Aggregator
from ips.network.encoder import ResNet
from ips.network.heads import linear_head
from ips.network.model import IPSModel
from pipeline.bags.sources import open_bag
from pipeline.cluster import connected, prepare_environment
from pipeline.cohort.table import CohortSlide
from pipeline.config.compose import load_config
from pipeline.config.data import TilingConfig
from pipeline.config.model import SelectConfig, TrainConfig
from pipeline.config.recipe import Config
from pipeline.ingest.tiler import store_slide
from pipeline.model.build import build_model, build_optimizer
from pipeline.model.checkpoint import Progress, take_snapshot
from pipeline.store.patches import PatchStore, StoredSlide
from pipeline.tracking.tracker import open_tracking
from pipeline.training.driver import train
from pipeline.training.hands import Slides
from pipeline.training.headroom import peak_resident_bytes
from pipeline.training.loop import train_steps
from pipeline.training.ranks import Ranks
from pipeline.training.saver import Saver
from pipeline.training.session import Job, training_slides
from tests.bench.canvas import EDGE, TILE, repeat
from tests.bench.clocks import clocked
from tests.bench.memory import PoolingStub

_MIB = 2**20
_GPU = torch.cuda.is_available()
_BATCH = 16
_EPOCHS = 3  # of each loop; the first one warms up
_ROUNDS = 2
Stored = tuple[CohortSlide, StoredSlide]


@dataclass(frozen=True)
class Goal:
    """`found` may be `allowed` at most."""

    name: str
    found: float
    allowed: float
    unit: str

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.found <= self.allowed


def _stored(folder: Path, edge: int, seed: int, config: Config) -> Stored:
    """A square image of stained noise, every patch another one, in the patch store below a folder."""
    path = folder / f"{edge}-{seed}.png"
    generator = np.random.default_rng(seed)
    pixels = generator.integers((140, 50, 120), (215, 130, 200), size=(edge, edge, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=1)
    return _committed(path, config.tiling, folder, label=str(seed % 2))


def _committed(path: Path, spec: TilingConfig, folder: Path, label: str) -> Stored:
    slide = CohortSlide(path.stem, str(path), path.stem, "train", None, {"lesion": label}, {})
    status = store_slide(slide, spec, str(folder / "store"))
    if status.key is None:
        raise RuntimeError(status.reason)
    return slide, PatchStore(str(folder / "store"), spec.fingerprint()).slide(status.key)


def _made_slide(folder: Path, rows: int, times: int = 1) -> Stored:
    """A slide of stained clouds, 48 tiles wide and `times` x `rows` high, in the patch store below a folder.

    A chunk of 256 patches never holds a tile twice: the picture is repeated downwards.
    """
    import pyvips

    path = folder / f"tiles-{rows}.tiff"
    size = (rows * TILE // 8, EDGE // 8, 3)
    coarse = np.random.default_rng(0).integers((140, 50, 120), (215, 130, 200), size, np.uint8)
    picture = pyvips.Image.new_from_array(coarse).resize(8, kernel="cubic").copy(xres=2000, yres=2000)
    picture.tiffsave(str(path), tile=True, tile_width=TILE, tile_height=TILE, pyramid=True, compression="jpeg", Q=70)
    if times > 1:
        path = repeat(path, folder / "repeated.tiff", 1, times)
    return _committed(path, TilingConfig(codec="original", tissue="none"), folder, label="0")


def _job(folder: Path, slides: int) -> Job:
    """The demo's recipe, without validation, on eight images listed over and over."""
    config = load_config(
        "demo",
        [
            f"storage.root={folder}",
            "tiling=image",
            "tiling.patch_px=32",
            f"train.epochs={_EPOCHS}",
            "train.warmup_epochs=1",
            "train.explore_epochs=0",
            f"cluster.cpus_per_worker={os.cpu_count()}",
            f"train.threads={os.cpu_count()}",
        ],
    )
    made = [_stored(folder, 384, seed, config) for seed in range(8)]  # 144 patches each
    listed = tuple((replace(slide, slide_id=str(n)), source) for n in range(slides) for slide, source in [made[n % 8]])
    tracker = open_tracking(f"sqlite:///{folder}/mlflow.db", "bench", str(folder / "artifacts"))
    return Job(config, listed, (), "bench", str(folder / "run"), tracker, tracker.start_run("train"))


def bare(job: Job) -> list[float]:
    """Seconds of each epoch after the first of the loop alone."""
    settings = job.config.train
    torch.set_num_threads(settings.threads)  # as the Ray worker does, which also fixes MKL's number
    torch.manual_seed(0)
    model = build_model(job.config)
    optimizer = build_optimizer(model, settings)
    steps = train_steps(
        model,
        optimizer,
        training_slides(job),
        settings,
        job.config.model.select,
        seed=0,
        start_epoch=0,
        ranks=Ranks(),
    )
    ends = [time.time() for done in steps if done.last_of_epoch]
    return [float(seconds) for seconds in np.diff(ends)]


def _bare_elsewhere(file: Path) -> list[float]:
    command = [sys.executable, "-m", "tests.bench.train", "--bare", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}  # as Ray starts its worker
    seconds: list[float] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    )
    return seconds


def _under_ray(job: Job, number: int) -> list[float]:
    """Seconds of each epoch after the first, by the times at which they were logged."""
    run_id = job.tracker.start_run(f"train {number}")
    with connected(job.config.cluster), job.tracker.system_metrics(run_id):  # as a run of the pipeline has it
        train(job.config, job.train, job.val, f"bench{number}", job.tracker, run_id)
    history = job.tracker.client.get_metric_history(run_id, "epoch")
    return [float(ms) / 1000 for ms in np.diff(sorted(metric.timestamp for metric in history))]


def _checkpoint_seconds(job: Job, folder: Path) -> float:
    """Median time of a whole checkpoint: copy, files, digests, commit."""
    model = build_model(job.config)
    optimizer = build_optimizer(model, job.config.train)
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # so that it has its moments
    seconds = []
    for step in range(1, 8):
        start = time.perf_counter()
        with Saver(str(folder)) as saver:
            saver.save(take_snapshot(model, optimizer, job.config, Progress(0, step, "bench")))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def overhead(folder: Path, *, quick: bool) -> tuple[dict[str, object], list[Goal]]:
    """Parts 1 and 2."""
    job = _job(folder, 24 if quick else 200)
    file = folder / "job"
    file.write_bytes(pickle.dumps(job))
    loops: dict[str, list[float]] = {"bare": [], "ray": []}
    for number in range(1 if quick else _ROUNDS):
        loops["bare"] += _bare_elsewhere(file)
        loops["ray"] += _under_ray(job, number)
    alone, beside = min(loops["bare"]), min(loops["ray"])  # what other programs take from an epoch is left out
    checkpoint = _checkpoint_seconds(job, folder / "checkpoints")
    table = {"slides": len(job.train), "bare_epochs_s": loops["bare"], "ray_epochs_s": loops["ray"]}
    print(f"\nan epoch of {len(job.train)} slides, the fastest of {[round(s, 2) for s in loops['bare']]} s")
    print(f"  bare loop            {alone:7.3f} s\n  under Ray and MLflow {beside:7.3f} s", end="")
    print(f"   of {[round(s, 2) for s in loops['ray']]}\n  a checkpoint         {checkpoint:7.3f} s", flush=True)
    return {**table, "checkpoint_s": checkpoint}, [
        Goal("Ray and MLflow, of an epoch", 100 * (beside / alone - 1), 5.0, "%"),
        Goal("a checkpoint, of an epoch", 100 * checkpoint / alone, 1.0, "%"),
    ]


def one_step(file: Path, memory: int) -> None:
    """One step on a slide listed 16 times, in this process.

    Prints peak MiB of host and device, seconds, and of the step the shares in which the loop waits for patches, the
    threads decode, patches are on their way to the device, and the encoder scores. They overlap.
    """
    threads = os.cpu_count() or 1
    (_, source), device = pickle.loads(file.read_bytes()), torch.device("cuda" if _GPU else "cpu")
    torch.manual_seed(0)
    trunk: ResNet | PoolingStub = ResNet("resnet18") if _GPU else PoolingStub()
    pool = Aggregator(trunk.dim, tasks=1, heads=8, key_dim=16, value_dim=16, hidden_dim=64, dropout=0.0)
    model = IPSModel(trunk, pool, {"t": linear_head("binary", trunk.dim, 2)}).to(device)

    def bag(_index: int, _epoch: int) -> Bag:
        return open_bag(source, threads=threads, augment=None)

    targets = [{"t": float(n % 2)} for n in range(_BATCH)]
    slides = Slides([source.n_patches] * _BATCH, targets, {"t": "binary"}, bag)
    settings = TrainConfig(epochs=1, batch_size=_BATCH, warmup_epochs=0, bounded=True, norm="group", augment=False)
    select = SelectConfig(memory=memory, chunk=256)
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters())
    with clocked() as clocks:
        slides = replace(slides, announce=lambda _order: clocks.reset())  # without the trial before step one
        (done,) = train_steps(model, optimizer, slides, settings, select, seed=0, start_epoch=0, ranks=Ranks())
        spent = clocks.read()
    shares = {
        "device_wait": done.waited / done.seconds,
        "decode": spent["decode"] / threads / done.seconds,  # of the decoding threads' time
        "transfer": spent["transfer"] / done.seconds,
        "encode": spent["encode"] / done.seconds,
    }
    peak = peak_resident_bytes() / _MIB
    on_device = torch.cuda.max_memory_allocated() / _MIB if _GPU else 0.0
    print(json.dumps([peak, on_device, time.perf_counter() - start, shares]))


def _line(folder: Path, name: str, source: Stored, memory: int) -> dict[str, float]:
    file = folder / name
    file.write_bytes(pickle.dumps(source))
    command = [sys.executable, "-m", "tests.bench.train", "--step", str(file), str(memory)]
    host, device, seconds, shares = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    N = source[1].n_patches
    found = f"host {host:8.1f} MiB  device {device:8.1f} MiB  {seconds:6.1f} s"
    print(f"  N = {N:7d}  B = {_BATCH}  M = {memory:5d}: {found}")
    print("    of the step: " + ", ".join(f"{what} {100 * share:.0f}%" for what, share in shares.items()), flush=True)
    figures = {"host_mib": host, "device_mib": device, "seconds": seconds, **shares}
    return {"N": N, "B": _BATCH, "M": memory, **figures}


def _images(folder: Path, *, quick: bool) -> tuple[dict[int, Stored], Stored]:
    """For each M the image that the large one is compared with, and that one."""
    if _GPU:
        few = {M: _made_slide(folder, rows) for M, rows in ((64, 21), (5000, 105))}
        return few, _made_slide(folder, 48, 7 if quick else 110)
    config = load_config("demo", [f"storage.root={folder}", "tiling=image", "tiling.patch_px=16"])
    few = {M: _stored(folder, edge, 0, config) for M, edge in ((64, 512), (5000, 1136))}
    return few, _stored(folder, 2000 if quick else 8000, 0, config)


def memory(folder: Path, *, quick: bool) -> tuple[list[dict[str, float]], list[Goal]]:
    """Part 3."""
    few, large = _images(folder, quick=quick)
    print(f"\na step; one image of patches of {large[1].patch_px} px, listed {_BATCH} times")
    table: list[dict[str, float]] = []
    goals: list[Goal] = []
    for M, small in few.items():
        lines = [_line(folder, name, source, M) for name, source in (("small", small), ("large", large))]
        table += lines
        grown = (lines[1]["host_mib"] - lines[0]["host_mib"]) * _MIB / _BATCH / (lines[1]["N"] - lines[0]["N"])
        goals.append(Goal(f"host memory a patch, M = {M}", grown, 100.0, "B"))
        if _GPU:
            more = 100 * (lines[1]["device_mib"] / lines[0]["device_mib"] - 1)
            goals.append(Goal(f"device memory above that of few patches, M = {M}", more, 2.0, "%"))
            goals.append(Goal(f"device memory, M = {M}", lines[1]["device_mib"], 2048.0, "MiB"))
    return table, goals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="24 slides, 16,000 patches: whether it runs, no figures")
    parser.add_argument("--bare", type=Path, metavar="JOB", help="one bare loop, in this process")
    parser.add_argument("--step", nargs=2, metavar=("SLIDE", "M"), help="one step, in this process")
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare(pickle.loads(options.bare.read_bytes()))))
        return 0
    if options.step:
        one_step(Path(options.step[0]), int(options.step[1]))
        return 0
    prepare_environment()
    with tempfile.TemporaryDirectory(prefix="ips-bench-") as scratch:
        parts = [partial(part, Path(scratch), quick=options.quick) for part in (overhead, memory)]
        (epochs, goals), (steps, more) = parts[0](), parts[1]()
    print()
    for goal in goals + more:
        print(f"{'met   ' if goal.met else 'MISSED'}  {goal.name}: {goal.found:.3g} {goal.unit}, goal {goal.allowed:g}")
    outcome = [{**asdict(goal), "met": goal.met} for goal in goals + more]
    facts = {"device": torch.cuda.get_device_name() if _GPU else "cpu", "cores": os.cpu_count()}
    print(json.dumps({**facts, "torch": torch.__version__, "epoch": epochs, "steps": steps, "goals": outcome}))
    return int(not all(goal.met for goal in goals + more))


if __name__ == "__main__":
    sys.exit(main())
