"""A whole training step against the official one, official settings: `python -m tests.bench.step`.

Selection, forward, backward and AdamW on 16 Megapixel-MNIST images, N = 900, M = I = 100, 1,600 winners encoded with
the statistics of their batch. Every line adds one measure to the line above it. Loading is not timed.

The winners are encoded twice by both: once to be chosen, without gradient, and once with it. The first cannot be kept,
as its batch norms use other statistics. At these random weights most winners are blank; ours encodes each of them all
the same, since batch statistics count every copy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812, the usual name

from ips.bag import TensorBag
from ips.learning.losses import mean_loss, task_loss
from ips.learning.schedule import parameter_groups
from ips.network.heads import Kind
from ips.selection.scorer import Scorer
from ips.selection.select import gather, select
from tests.bench.scenes import (
    TASKS,
    Clock,
    Goal,
    add_mnist_option,
    check_mnist,
    megapixel_images,
    megapixel_networks,
    verdict,
)

_M = _I = 100
_OFFICIAL = "official step, float32"


@dataclass(frozen=True)
class Measures:
    """What one line of the table turns on."""

    dedupe: bool = False
    channels_last: bool = False
    fused_adamw: bool = False
    score_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype = torch.float32


_LINES = {
    "selection on logits, fused, channels-last": Measures(),
    "+ duplicates once": Measures(dedupe=True),
    "+ channels-last training": Measures(dedupe=True, channels_last=True),
    "+ fused AdamW": Measures(dedupe=True, channels_last=True, fused_adamw=True),
    "+ bfloat16 selection": Measures(dedupe=True, channels_last=True, fused_adamw=True, score_dtype=torch.bfloat16),
    "+ bfloat16 training": Measures(
        dedupe=True,
        channels_last=True,
        fused_adamw=True,
        score_dtype=torch.bfloat16,
        compute_dtype=torch.bfloat16,
    ),
}


def official_step(images: Tensor, targets: dict[str, Tensor]) -> Callable[[], None]:
    """The official step: float32, M patches encoded with batch statistics."""
    network = megapixel_networks(images.shape[1])[0].to(images.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)

    def step(count: int) -> None:
        optimizer.zero_grad()
        rows = network.ips(images[:count], _M, _I)
        winners = torch.gather(images[:count], 1, rows[..., None, None, None].expand(-1, -1, *images.shape[2:]))
        outputs = network(winners, rows)
        losses = [F.nll_loss((outputs[t] + 1e-6).log(), targets[t][:count].long()) for t in TASKS[:3]]
        losses.append(F.binary_cross_entropy(outputs["multi"], targets["multi"][:count]))
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step(1)
    return partial(step, len(images))


def our_step(images: Tensor, targets: dict[str, Tensor], measures: Measures) -> Callable[[], None]:
    """Ours, with the same number of patches encoded with batch statistics."""
    model = megapixel_networks(images.shape[1])[1].to(images.device).train()
    if measures.channels_last:
        model.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, fused=measures.fused_adamw)
    scorer = Scorer(
        model,
        dtype=measures.score_dtype,
        batch=1024 if images.is_cuda else 64,
        dedupe=measures.dedupe,
        compile=images.is_cuda,  # on a CPU it does not pay, see `tests.bench.selection`
    )
    bags = [TensorBag(image) for image in images]
    kinds: dict[str, Kind] = {task: "multilabel" if task == "multi" else "multiclass" for task in TASKS}
    compute = measures.compute_dtype

    def step(count: int) -> None:
        optimizer.zero_grad()
        batch = gather(bags[:count], select(model, bags[:count], _M, _I, scorer=scorer), images.device)
        with torch.autocast(images.device.type, compute, enabled=compute == torch.bfloat16):
            outputs = model(batch)
        wanted = {task: target[:count] for task, target in targets.items()}
        mean_loss(task_loss(outputs, wanted, kinds)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step(1)
    return partial(step, len(images))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    add_mnist_option(parser)
    Clock.add_option(parser)
    options = parser.parse_args()
    check_mnist(parser, options.mnist)
    clock = Clock.from_options(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = megapixel_images(options.images, folder=options.mnist).to(device)
    generator = torch.Generator().manual_seed(0)
    targets = {task: torch.randint(0, 10, (options.images,), generator=generator).to(device) for task in TASKS[:3]}
    targets["multi"] = torch.randint(0, 2, (options.images, 10), generator=generator).float().to(device)
    runs = {_OFFICIAL: official_step(images, targets)}
    for label, measures in _LINES.items():
        runs[label] = our_step(images, targets, measures)
    best = clock.race(runs, options.rounds)
    base = best[_OFFICIAL]
    print(f"images {tuple(images.shape)}, M = I = {_M}")
    for label, seconds in best.items():
        print(f"  {label:44s} {1000 * seconds:9.0f} ms {base / seconds:7.2f}x")
    full = {label for label, measures in _LINES.items() if measures.score_dtype == torch.float32}
    goals = [
        Goal("float32", base / min(best[label] for label in full), 4.0),
        Goal("bfloat16", base / min(best[label] for label in _LINES), 7.0),
    ]
    return verdict(goals, {label: 1000 * seconds for label, seconds in best.items()}, clock)


if __name__ == "__main__":
    sys.exit(main())
