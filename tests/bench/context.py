"""What context is worth and what it costs: `python -m tests.bench.context`, some minutes on two cores.

    burden   whether a larger share of a slide is lesions (`tests.bench.lesions`), more than M = 8 of them in both
             classes: the M winners alone, all patches as context of the M, and all with gradient; three seeds
    memory   of a process that scores N = 1,000 and 250,000 patches with a stub, to predict and to learn
    time     of a pass with context over one without, and of one whose heads take patches in turn (`rank`), the fastest
             of some rounds in turns

Exits 1 where a goal is missed: `all` within 0.01 AUC of the full model and 0.15 above `none`; memory that grows by no
more than is kept of a patch on the host anyway (100 B); 5% of time beside a ResNet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from statistics import mean
from typing import Literal

import torch
from torch import nn

from ips.bag import TensorBag
from ips.network.aggregator import Aggregator
from ips.network.encoder import FeatureProjector, ResNet
from ips.network.model import IPSModel
from ips.selection.select import select
from pipeline.config.model import SelectConfig, TrainConfig
from pipeline.training.headroom import peak_resident_bytes
from tests.bench.lesions import Law, auc, draw, mean_and_spread, stamp, trained
from tests.bench.memory import PoolingStub
from tests.bench.scenes import Clock, EndlessBag, Goal

LAW = Law(patches=(200, 300), lesions=((0.045, 0.075), (0.13, 0.18)), marked=0.2, contrast=2.0, own=6.0)
METHODS = {
    "none": SelectConfig(memory=8, chunk=256),
    "all": SelectConfig(memory=8, chunk=256, context="all", learn_from="drawn"),
    "full": SelectConfig(mode="every", chunk=256),
}
_MIB = 2**20
Use = Literal["whole", "rest"]


def burden(seeds: list[int], epochs: int, explore: int) -> list[Goal]:
    """Train and test each method, on one thread: products are small."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    settings = TrainConfig(
        epochs=epochs, batch_size=8, lr=2e-3, warmup_epochs=1, explore_epochs=explore, augment=False, score_batch=256
    )
    for seed in seeds:
        train, test = draw(LAW, 200, 2 * seed + 1), draw(LAW, 200, 2 * seed + 2)
        for method, selecting in METHODS.items():
            began = time.perf_counter()
            model = trained(train, settings, selecting, seed)
            found[method].append(auc(model, test, selecting))
            print(
                f"  {method:4s} seed {seed}: AUC {found[method][-1]:.3f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    for method, aucs in found.items():
        print(f"| {method} | {mean_and_spread(aucs)} |")
    none, every, full = (mean(found[method]) for method in METHODS)
    return [
        Goal("burden: all above none, AUC", every - none, 0.15),
        Goal("burden: all less full, AUC", every - full, -0.01),
    ]


def one(N: int, context: Use | None) -> None:
    """Score N patches in this process; print its peak in MiB, and the seconds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    stub = PoolingStub()
    model = IPSModel(stub, Aggregator(stub.dim, 1, 8, 16, 16, 64), {"t": nn.Linear(stub.dim, 1)})
    began = time.perf_counter()
    select(model, [EndlessBag(N, (3, 16, 16), 0)], 64, 512, context=context)
    print(f"{peak_resident_bytes() / _MIB:.1f} {time.perf_counter() - began:.1f}")


def memory(sizes: tuple[int, int]) -> list[Goal]:
    """How far the peak grows with N, less what is kept of a patch anyway."""
    goals = []
    for context in (None, "whole", "rest"):
        peaks = []
        for N in sizes:
            command = [sys.executable, "-m", "tests.bench.context", "--one", str(N), context or "none"]
            peak, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            print(f"  stub, context {context or 'none':5s} N = {N:7d}: {peak} MiB, {seconds} s", flush=True)
            peaks.append(float(peak))
        spare = 100 * (sizes[1] - sizes[0]) / _MIB + 0.1 * peaks[0] - (peaks[1] - peaks[0])
        goals.append(Goal(f"{context}: MiB of growth to spare", spare, 0))
    return goals


def seconds(clock: Clock, rounds: int) -> list[Goal]:
    """Passes of one image with and without context."""
    resnet = ResNet("resnet18")
    scenes = {
        "ResNet-18, 64 px": (resnet, Aggregator(resnet.dim, 1, 8, 64, 64, 2048), torch.rand(512, 3, 64, 64)),
        "features 1,024 to 512, T = 1": _features(1),
        "features 1,024 to 512, T = 4": _features(4),
    }
    goals = []
    for name, (encoder, aggregator, patches) in scenes.items():
        tasks = {f"t{n}": nn.Linear(encoder.dim, 1) for n in range(aggregator.tasks)}
        model, bag = IPSModel(encoder, aggregator, tasks).eval(), TensorBag(patches)
        runs = {
            str(context): partial(select, model, [bag], 64, 512, context=context) for context in (None, "whole", "rest")
        }
        runs["heads"] = partial(select, model, [bag], 64, 512, rank="heads")
        best = clock.race(runs, rounds)
        ratios = [best[use] / best["None"] for use in ("whole", "rest", "heads")]
        print(f"| {name} | {best['None']:.2f} s | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |", flush=True)
        if encoder is resnet:
            goals += [
                Goal(f"{name}: time without over with, {use}", best["None"] / best[use], 1 / 1.05)
                for use in ("whole", "rest")
            ]
    return goals


def _features(tasks: int) -> tuple[FeatureProjector, Aggregator, torch.Tensor]:
    encoder = FeatureProjector(1024, 512)
    return encoder, Aggregator(512, tasks, 8, 16, 16, 512), torch.randn(10_000, 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("N", "CONTEXT"), help="a single line of memory, in this process")
    parser.add_argument("--parts", nargs="+", default=["burden", "memory", "time"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--explore", type=int, default=6, help="epochs of them with M random patches (not in full)")
    parser.add_argument("--rounds", type=int, default=5)
    Clock.add_option(parser)
    options = parser.parse_args()
    if options.one:
        N, context = options.one
        one(int(N), None if context == "none" else context)
        return 0
    goals: list[Goal] = []
    if "burden" in options.parts:
        goals += burden(options.seeds, options.epochs, options.explore)
    if "memory" in options.parts:
        goals += memory((1000, 250_000))
    if "time" in options.parts:
        goals += seconds(Clock.from_options(options), options.rounds)
    for goal in goals:
        print(f"{'met   ' if goal.met else 'MISSED'}  {goal.name}: {goal.found:.3f}, goal {goal.goal:.3f}")
    facts = [{"name": goal.name, "found": goal.found, "goal": goal.goal, "met": goal.met} for goal in goals]
    print(json.dumps({**stamp(), "goals": facts}))
    return int(not all(goal.met for goal in goals))


if __name__ == "__main__":
    sys.exit(main())
