"""Selection against the official loop, same weights, same patches, one run: `python -m tests.bench.selection`.

Every line adds one measure to the line above it, so the table says what each contributes.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from torch import Tensor

from ips.bag import TensorBag
from ips.model import IPSModel
from ips.scorer import Scorer
from ips.select import select
from tests.bench.scenes import MNIST, best_seconds, megapixel_images, megapixel_networks, slide_networks, verdict
from tests.oracle import OfficialNet

_OFF = {"fuse": False, "channels_last": False, "dedupe": False}
_STEPS: list[tuple[str, dict[str, bool], torch.dtype]] = [
    ("logits only: folded query, small batches", _OFF, torch.float32),
    ("+ fused batch norm", {**_OFF, "fuse": True}, torch.float32),
    ("+ channels-last", {"dedupe": False}, torch.float32),
    ("+ bfloat16", {"dedupe": False}, torch.bfloat16),
    ("+ compiled", {"dedupe": False, "compile": True}, torch.bfloat16),
    ("+ duplicates once", {"compile": True}, torch.bfloat16),
]


def compare(
    name: str,
    networks: tuple[OfficialNet, IPSModel],
    images: Tensor,
    M: int,
    chunk: int,
    *,
    compiled: bool,
    repeats: int,
) -> float:
    """Print a table for images (B, N, C, h, w); the speed-up of the fastest line."""
    official, ours = networks[0].to(images.device).eval(), networks[1].to(images.device).eval()
    patches = images.shape[0] * images.shape[1]
    base = best_seconds(lambda: official.ips(images, M, chunk), repeats)
    print(f"\n{name}: {tuple(images.shape)}, M = {M}, I = {chunk}")
    print(f"  {'official loop, float32':44s} {patches / base:9.0f} patches/s")
    bags = [TensorBag(image) for image in images]
    batch = 1024 if images.is_cuda else 32  # patches of 50 px are small
    reference = select(ours, bags, M, chunk).index
    fastest = base
    for label, measures, dtype in _STEPS:
        if measures.get("compile") and not compiled:
            measures = {key: value for key, value in measures.items() if key != "compile"}
        scorer = Scorer(ours, dtype=dtype, batch=batch, **measures)

        def ours_once(scorer: Scorer = scorer) -> Tensor:
            scorer.refresh()
            return select(ours, bags, M, chunk, scorer=scorer).index

        seconds = best_seconds(ours_once, repeats)
        kept = _overlap(ours_once(), reference)
        print(f"  {label:44s} {patches / seconds:9.0f} patches/s {base / seconds:7.2f}x   same winners {kept:.3f}")
        fastest = min(fastest, seconds)
    return base / fastest


def _overlap(a: Tensor, b: Tensor) -> float:
    """Share of winners (B, M) in common."""
    return sum(float(torch.isin(x, y).float().mean()) for x, y in zip(a, b, strict=True)) / len(a)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16, help="Megapixel-MNIST images a call (official: 16)")
    parser.add_argument("--slides", type=int, default=128, help="patches of 224 px")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags = {"compiled": not options.no_compile, "repeats": options.repeats}
    dense = torch.rand(options.images, 900, 1, 50, 50, generator=torch.Generator().manual_seed(1)).to(device)
    goals = [("dense", compare("dense random patches", megapixel_networks(900), dense, 100, 100, **flags), 8.0)]
    if MNIST.is_dir():
        real = megapixel_images(options.images).to(device)
        found = compare("Megapixel-MNIST", megapixel_networks(900), real, 100, 100, **flags)
        goals.append(("Megapixel-MNIST", found, 30.0))
    else:
        print(f"\nMegapixel-MNIST left out: no MNIST files in {MNIST}")
    slides = torch.rand(1, options.slides, 3, 224, 224, generator=torch.Generator().manual_seed(2)).to(device)
    found = compare("ResNet-18 at 224 px", slide_networks(), slides, 16, 32, **flags)
    goals.append(("ResNet-18 at 224 px", found, 7.0))
    return verdict(goals)


if __name__ == "__main__":
    sys.exit(main())
