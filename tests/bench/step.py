"""A whole training step against the official one, official settings: `python -m tests.bench.step`.

Selection, forward, backward and AdamW on 16 Megapixel-MNIST images, N = 900, M = I = 100. Loading is not timed.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812, the usual name

from ips.bag import TensorBag
from ips.heads import Kind
from ips.losses import mean_loss, task_loss
from ips.schedule import parameter_groups
from ips.scorer import Scorer
from ips.select import gather, select
from tests.bench.scenes import TASKS, best_seconds, megapixel_images, megapixel_networks, verdict

_M = _I = 100


def official_step(images: Tensor, targets: dict[str, Tensor], repeats: int) -> float:
    """Seconds of the official step: float32, M patches encoded with batch statistics."""
    network = megapixel_networks(images.shape[1])[0].to(images.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)

    def step() -> None:
        optimizer.zero_grad()
        rows = network.ips(images, _M, _I)
        winners = torch.gather(images, 1, rows[..., None, None, None].expand(-1, -1, *images.shape[2:]))
        outputs = network(winners, rows)
        losses = [F.nll_loss((outputs[t] + 1e-6).log(), targets[t].long()) for t in TASKS[:3]]
        losses.append(F.binary_cross_entropy(outputs["multi"], targets["multi"]))
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return best_seconds(step, repeats)


def our_step(images: Tensor, targets: dict[str, Tensor], repeats: int, dtype: torch.dtype, *, compiled: bool) -> float:
    """Seconds of ours, with the same number of patches encoded with batch statistics."""
    model = megapixel_networks(images.shape[1])[1].to(images.device).train()
    for parameter in model.encoder.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3)
    scorer = Scorer(model, dtype=dtype, batch=1024 if images.is_cuda else 32, compile=compiled)
    bags = [TensorBag(image) for image in images]
    kinds: dict[str, Kind] = {task: "multilabel" if task == "multi" else "multiclass" for task in TASKS}

    def step() -> None:
        optimizer.zero_grad()
        scorer.refresh()
        batch = gather(bags, select(model, bags, _M, _I, scorer=scorer), images.device)
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            outputs = model(batch)
        mean_loss(task_loss(outputs, targets, kinds)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return best_seconds(step, repeats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = megapixel_images(options.images).to(device)
    generator = torch.Generator().manual_seed(0)
    targets = {task: torch.randint(0, 10, (options.images,), generator=generator).to(device) for task in TASKS[:3]}
    targets["multi"] = torch.randint(0, 2, (options.images, 10), generator=generator).float().to(device)
    base = official_step(images, targets, options.repeats)
    print(f"official step, float32: {1000 * base:.0f} ms for {tuple(images.shape)}, M = I = {_M}")
    goals = []
    for name, dtype, goal in (("float32", torch.float32, 4.0), ("bfloat16", torch.bfloat16, 7.0)):
        seconds = our_step(images, targets, options.repeats, dtype, compiled=not options.no_compile)
        print(f"our step, {name}: {1000 * seconds:.0f} ms")
        goals.append((name, base / seconds, goal))
    return verdict(goals)


if __name__ == "__main__":
    sys.exit(main())
