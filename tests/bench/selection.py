"""Selection against the official loop, same weights, same patches, one run: `python -m tests.bench.selection`.

Every line adds one measure to the line above it, so the table says what each contributes; the goal takes the fastest.
The ceiling is the rate of a plain bfloat16 matrix product divided by the multiplications of the network: without AMX
or tensor cores it is what limits the dense goals.

Two things to know of the ratios (figures and what did not pay: results/fast_path.md). The official loop encodes B * I
patches at once, and on a CPU whose allocator returns large blocks to the system, as glibc does by default, 40% of its
time at the official 1,600 patches goes into page faults: with memory kept it was 1.8 times as fast. And compiling costs
5% on a CPU without AMX, whose convolutions run at the limit of its dot-product instruction already.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ips.bag import TensorBag
from ips.network.model import IPSModel
from ips.selection.scorer import Scorer
from ips.selection.select import select
from tests.bench.scenes import (
    Clock,
    Goal,
    add_mnist_option,
    check_mnist,
    megapixel_images,
    megapixel_networks,
    multiplications,
    product_rate,
    slide_networks,
    verdict,
)
from tests.oracle import OfficialNet

_OFFICIAL = "official loop, float32"
_OFF = {"fold": False, "fuse": False, "channels_last": False, "dedupe": False}
_STEPS: list[tuple[str, dict[str, bool], torch.dtype]] = [
    ("logits kept, batches that fit the cache", _OFF, torch.float32),
    ("+ folded query", {**_OFF, "fold": True}, torch.float32),
    ("+ fused batch norm", {"channels_last": False, "dedupe": False}, torch.float32),
    ("+ channels-last", {"dedupe": False}, torch.float32),
    ("+ bfloat16", {"dedupe": False}, torch.bfloat16),
    ("+ duplicates once", {}, torch.bfloat16),
    ("+ compiled", {"compile": True}, torch.bfloat16),
]


def compare(
    name: str, networks: tuple[OfficialNet, IPSModel], images: Tensor, M: int, chunk: int, clock: Clock, rounds: int
) -> tuple[float, dict[str, float]]:
    """Print a table for images (B, N, C, h, w): the speed-up of the fastest line, and patches a second of each."""
    official, ours = networks[0].to(images.device).eval(), networks[1].to(images.device).eval()
    small = images.shape[-1] <= 50  # on a CPU batches as the activations fit the cache: 4% and 6% over 32
    batch = (1024 if small else 256) if images.is_cuda else (64 if small else 16)
    bags = [TensorBag(image) for image in images]
    winners: dict[str, Tensor] = {}

    def choose(label: str, scorer: Scorer, bags: list[TensorBag]) -> None:
        scorer.refresh()
        winners[label] = select(ours, bags, M, chunk, scorer=scorer).index

    runs: dict[str, Callable[[], object]] = {_OFFICIAL: partial(official.ips, images, M, chunk)}
    official.ips(images[:1, : M + chunk], M, chunk)  # nothing is timed cold, nothing compiles inside the race
    for label, measures, dtype in _STEPS:
        scorer = Scorer(ours, dtype=dtype, batch=batch, **measures)
        choose(label, scorer, [TensorBag(images[0, : M + chunk])])
        runs[label] = partial(choose, label, scorer, bags)
    best = clock.race(runs, rounds)
    patches = images.shape[0] * images.shape[1]
    rates = {label: patches / seconds for label, seconds in best.items()}
    reference = winners[_STEPS[0][0]]
    print(f"\n{name}: {tuple(images.shape)}, M = {M}, I = {chunk}")
    for label in runs:
        kept = f"   same winners as float32 {_overlap(winners[label], reference):.3f}" if label in winners else ""
        print(f"  {label:44s} {rates[label]:9.0f} patches/s {rates[label] / rates[_OFFICIAL]:7.2f}x{kept}")
    work = multiplications(ours.encoder.cpu(), images[0, :1].cpu())
    rates["ceiling, bfloat16"] = product_rate(torch.bfloat16, images.device, clock) / work
    ceiling = rates["ceiling, bfloat16"]
    print(
        f"  {'ceiling where no patch is a duplicate':44s} {ceiling:9.0f} patches/s {ceiling / rates[_OFFICIAL]:7.2f}x"
    )
    return max(rates[label] for label, _, _ in _STEPS) / rates[_OFFICIAL], rates


def _overlap(a: Tensor, b: Tensor) -> float:
    """Share of winners (B, M) in common."""
    return sum(float(torch.isin(x, y).float().mean()) for x, y in zip(a, b, strict=True)) / len(a)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16, help="Megapixel-MNIST images a call (official: 16)")
    parser.add_argument("--slides", type=int, default=128, help="patches of 224 px")
    parser.add_argument("--rounds", type=int, default=2)
    add_mnist_option(parser)
    parser.add_argument("--only", choices=("dense", "mnist", "slides"), help="one of the three")
    Clock.add_option(parser)
    options = parser.parse_args()
    clock = Clock.from_options(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = (options.only,) if options.only else ("dense", "mnist", "slides")
    if "mnist" in wanted:
        check_mnist(parser, options.mnist)
    goals, table = [], {}
    flags = (100, 100, clock, options.rounds)
    if "dense" in wanted:
        dense = torch.rand(options.images, 900, 1, 50, 50, generator=torch.Generator().manual_seed(1)).to(device)
        found, table["dense"] = compare("dense random patches", megapixel_networks(900), dense, *flags)
        goals.append(Goal("dense", found, 8.0))
    if "mnist" in wanted:
        real = megapixel_images(options.images, folder=options.mnist).to(device)
        found, table["mnist"] = compare("Megapixel-MNIST", megapixel_networks(900), real, *flags)
        goals.append(Goal("Megapixel-MNIST", found, 30.0))
    if "slides" in wanted:
        slides = torch.rand(1, options.slides, 3, 224, 224, generator=torch.Generator().manual_seed(2)).to(device)
        found, table["slides"] = compare("ResNet-18 at 224 px", slide_networks(), slides, 16, 32, clock, options.rounds)
        goals.append(Goal("ResNet-18 at 224 px", found, 7.0))
    return verdict(goals, table, clock)


if __name__ == "__main__":
    sys.exit(main())
