"""What training costs beside the training: `python -m tests.bench.train` (10 minutes; --quick: two).

1. An epoch on 200 slides under Ray Train and MLflow, as `pipeline train` runs it, against the bare loop on the same
   slides, in turns: bare, Ray, bare. The slides are eight made images, listed 25 times each, through the patch store.
2. A checkpoint of the demo model, from the copy to the commit, against that epoch.
3. Peak memory of a step on images of 250,000 patches against images of 1,024, M = 64 and 5,000. One made image of 64
   megapixels, cut into patches of 16 px and listed 16 times. A pooling stub encodes on a CPU, where decoding takes the
   time (0.1 ms a patch): M = 5,000 there has it 4 times; the paper's ResNet-18 on a GPU.

Every line of 3 and every bare loop is a process of its own. Exit code 1 when a goal is missed.
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
import ray
import torch
from PIL import Image
from torch import nn

from ips.aggregator import Aggregator
from ips.bag import Bag
from ips.encoder import ResNet
from ips.heads import linear_head
from ips.model import IPSModel
from pipeline.build import build_model, build_optimizer
from pipeline.checkpoint import Progress, take_snapshot
from pipeline.cluster import prepare_environment
from pipeline.cohort import CohortSlide
from pipeline.compose import load_config
from pipeline.config import Config
from pipeline.config_model import SelectConfig, TrainConfig
from pipeline.loop import Slides, train_steps
from pipeline.patches import PatchStore
from pipeline.ranks import Ranks
from pipeline.saver import Saver
from pipeline.session import Job, peak_resident_bytes, training_slides
from pipeline.sources import LabelledSource, open_bag
from pipeline.tiler import store_slide
from pipeline.tracking import open_tracking
from pipeline.train import train
from tests.bench.memory import PoolingStub

_MIB = 2**20
_BATCHES = {64: 16, 5000: 16 if torch.cuda.is_available() else 4}  # M -> images a step


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


def _image(path: Path, edge: int, seed: int) -> None:
    """Stained noise, every patch another one."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers((140, 50, 120), (215, 130, 200), size=(edge, edge, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=1)


def _stored(folder: Path, edge: int, seed: int, config: Config) -> LabelledSource:
    """A made image in the patch store below a folder."""
    path = folder / f"{edge}-{seed}.png"
    _image(path, edge, seed)
    slide = CohortSlide(path.stem, str(path), path.stem, "train", None, {"lesion": str(seed % 2)}, {})
    status = store_slide(slide, config.tiling, str(folder / "store"))
    if status.key is None:
        raise RuntimeError(status.reason)
    return slide, PatchStore(str(folder / "store"), config.tiling.fingerprint()).slide(status.key)


def _job(folder: Path, slides: int, epochs: int) -> Job:
    """The demo's recipe, without validation, on eight images listed over and over."""
    config = load_config(
        "demo",
        [
            f"storage.root={folder}",
            "tiling=image",
            "tiling.patch_px=32",
            f"train.epochs={epochs}",
            "train.warmup_epochs=1",
            "train.explore_epochs=0",
            f"cluster.cpus_per_worker={os.cpu_count()}",
        ],
    )
    made = [_stored(folder, 768, seed, config) for seed in range(8)]
    listed = tuple((replace(slide, slide_id=str(n)), source) for n in range(slides) for slide, source in [made[n % 8]])
    tracker = open_tracking(f"sqlite:///{folder}/mlflow.db", "bench", str(folder / "artifacts"))
    return Job(config, listed, (), "bench", str(folder / "run"), tracker, tracker.start_run("train"))


def bare(job: Job) -> list[float]:
    """Seconds of each epoch after the first of the loop alone."""
    torch.manual_seed(0)
    model = build_model(job.config)
    settings = job.config.train
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
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    seconds: list[float] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    )
    return seconds


def _under_ray(job: Job) -> list[float]:
    """Seconds of each epoch after the first, by the times at which they were logged."""
    prepare_environment()
    ray.init(address="local", include_dashboard=False, object_store_memory=200 * _MIB, log_to_driver=False)
    train(job.config, job.train, job.val, "bench", job.tracker, job.run_id)
    ray.shutdown()
    history = job.tracker.client.get_metric_history(job.run_id, "epoch")
    return [float(ms) / 1000 for ms in np.diff([metric.timestamp for metric in history])]


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


def overhead(folder: Path, *, quick: bool) -> tuple[dict[str, float], list[Goal]]:
    """Parts 1 and 2."""
    job = _job(folder, 24 if quick else 200, 3)
    file = folder / "job"
    file.write_bytes(pickle.dumps(job))
    before = _bare_elsewhere(file)
    under_ray = _under_ray(job)
    after = _bare_elsewhere(file)
    alone, beside = statistics.median([*before, *after]), statistics.median(under_ray)
    checkpoint = _checkpoint_seconds(job, folder / "checkpoints")
    table = {"slides": len(job.train), "bare_epoch_s": alone, "ray_epoch_s": beside, "checkpoint_s": checkpoint}
    print(f"\nepoch of {len(job.train)} slides: bare loop {alone:.2f} s (of {[round(s, 2) for s in before + after]}),")
    print(
        f"  under Ray and MLflow {beside:.2f} s (of {[round(s, 2) for s in under_ray]}); checkpoint {checkpoint:.3f} s"
    )
    return table, [
        Goal("Ray and MLflow, of an epoch", 100 * (beside / alone - 1), 5.0, "%"),
        Goal("a checkpoint, of an epoch", 100 * checkpoint / alone, 1.0, "%"),
    ]


def one_step(file: Path, memory: int) -> None:
    """One step on a slide listed 16 times, in this process: peak MiB and seconds, and where the time went on a GPU."""
    (_, source), device = pickle.loads(file.read_bytes()), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    trunk: nn.Module = ResNet("resnet18") if device.type == "cuda" else PoolingStub()
    width = trunk.dim
    assert isinstance(width, int)
    pool = Aggregator(width, tasks=1, heads=8, key_dim=16, value_dim=16, hidden_dim=64, dropout=0.0)
    model = IPSModel(trunk, pool, {"t": linear_head("binary", width, 2)}).to(device)

    def bag(_index: int, _epoch: int) -> Bag:
        return open_bag(source, threads=os.cpu_count() or 1, augment=None)

    B = _BATCHES[memory]
    slides = Slides([source.n_patches] * B, [{"t": float(n % 2)} for n in range(B)], {"t": "binary"}, bag)
    settings = TrainConfig(epochs=1, batch_size=B, warmup_epochs=0, bounded=True, norm="group", augment=False)
    select = SelectConfig(memory=memory, chunk=256)
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters())
    (done,) = train_steps(model, optimizer, slides, settings, select, seed=0, start_epoch=0, ranks=Ranks())
    peak = peak_resident_bytes() / _MIB
    on_device = torch.cuda.max_memory_allocated() / _MIB if device.type == "cuda" else 0.0
    print(json.dumps([peak, on_device, time.perf_counter() - start, done.waited / done.seconds]))


def _line(folder: Path, name: str, source: LabelledSource, memory: int) -> dict[str, float]:
    file = folder / name
    file.write_bytes(pickle.dumps(source))
    command = [sys.executable, "-m", "tests.bench.train", "--step", str(file), str(memory)]
    host, device, seconds, waited = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    N, B = source[1].n_patches, _BATCHES[memory]
    print(
        f"  N = {N:7d}  B = {B:2d}  M = {memory:5d}: host {host:8.1f} MiB  device {device:8.1f} MiB  {seconds:6.1f} s",
        flush=True,
    )
    figures = {"host_mib": host, "device_mib": device, "seconds": seconds, "device_wait": waited}
    return {"N": N, "B": B, "M": memory, **figures}


def memory(folder: Path, *, quick: bool) -> tuple[list[dict[str, float]], list[Goal]]:
    """Part 3."""
    config = load_config("demo", [f"storage.root={folder}", "tiling=image", "tiling.patch_px=16"])
    small, large = (_stored(folder, edge, 0, config) for edge in (512, 2000 if quick else 8000))
    print("\na step")
    table: list[dict[str, float]] = []
    goals: list[Goal] = []
    for M, B in _BATCHES.items():
        lines = [_line(folder, name, source, M) for name, source in (("small", small), ("large", large))]
        table += lines
        grown = (lines[1]["host_mib"] - lines[0]["host_mib"]) * _MIB / B / (lines[1]["N"] - lines[0]["N"])
        goals.append(Goal(f"host memory a patch, M = {M}", grown, 100.0, "B"))
        if lines[0]["device_mib"]:
            more = 100 * (lines[1]["device_mib"] / lines[0]["device_mib"] - 1)
            goals.append(Goal(f"device memory above that of few patches, M = {M}", more, 2.0, "%"))
            goals.append(Goal(f"device memory, M = {M}", lines[1]["device_mib"], 2048.0, "MiB"))
    return table, goals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="24 slides, 15,625 patches: whether it runs, no figures")
    parser.add_argument("--bare", type=Path, metavar="JOB", help="one bare loop, in this process")
    parser.add_argument("--step", nargs=2, metavar=("SLIDE", "M"), help="one step, in this process")
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare(pickle.loads(options.bare.read_bytes()))))
        return 0
    if options.step:
        one_step(Path(options.step[0]), int(options.step[1]))
        return 0
    with tempfile.TemporaryDirectory(prefix="ips-bench-") as scratch:
        parts = [partial(part, Path(scratch), quick=options.quick) for part in (overhead, memory)]
        (epochs, goals), (steps, more) = parts[0](), parts[1]()
    print()
    for goal in goals + more:
        print(f"{'met   ' if goal.met else 'MISSED'}  {goal.name}: {goal.found:.3g} {goal.unit}, goal {goal.allowed:g}")
    outcome = [{**asdict(goal), "met": goal.met} for goal in goals + more]
    facts = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "cores": os.cpu_count()}
    print(json.dumps({**facts, "torch": torch.__version__, "epoch": epochs, "steps": steps, "goals": outcome}))
    return int(not all(goal.met for goal in goals + more))


if __name__ == "__main__":
    sys.exit(main())
