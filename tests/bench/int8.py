"""What int8 products give a ResNet-18 at 224 px on this CPU: `python -m tests.bench.int8`, ten minutes on an idle core.

    convolutions   of the trunk, one after another, in float32, in bfloat16 and in int8
    pass           the official loop, our selection in float32 and bfloat16, and a first pass in int8 throughout
                   (`tests.bench.bytes`), calibrated on its first chunk
    winners        a network that has learned lesions from slides of the demo: of the M patches that float32 takes on
                   unseen slides, how many a first pass takes too; alone, and after what it leaves in doubt is scored
                   again in float32, as `certify` does

What a whole selection in int8 would take follows from the last two: its pass, and a share of one in float32. Exits 1
where that is not five times as fast as the official loop with 99% of the winners.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import mean

import torch
from torch import Tensor, nn

from ips.bag import TensorBag
from ips.network.aggregator import Aggregator
from ips.network.encoder import ResNet
from ips.network.heads import linear_head
from ips.network.model import IPSModel
from ips.selection.certify import certified
from ips.selection.pools import LogitCache
from ips.selection.scorer import Scorer
from ips.selection.select import select
from pipeline.config.model import SelectConfig, TrainConfig
from pipeline.demo.picture import draw_slide
from pipeline.model.build import build_optimizer
from pipeline.training.hands import Slides
from pipeline.training.loop import train_steps
from pipeline.training.ranks import Ranks
from tests.bench.bytes import ByteConv, ByteResNet, Scale
from tests.bench.lesions import stamp
from tests.bench.scenes import Clock, Goal, slide_networks

PATCHES, MEMORY = 16, 16


@dataclass(frozen=True)
class Conv:
    """One shape of the trunk, and how often it comes."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int
    times: int

    @property
    def products(self) -> float:
        """Multiply-adds a patch, of all of them."""
        return self.times * self.inputs * self.outputs * (self.kernel * self.size / self.stride) ** 2


TRUNK = (
    Conv(3, 64, 7, 2, 224, 1),
    Conv(64, 64, 3, 1, 56, 4),
    Conv(64, 128, 3, 2, 56, 1), Conv(64, 128, 1, 2, 56, 1), Conv(128, 128, 3, 1, 28, 3),
    Conv(128, 256, 3, 2, 28, 1), Conv(128, 256, 1, 2, 28, 1), Conv(256, 256, 3, 1, 14, 3),
    Conv(256, 512, 3, 2, 14, 1), Conv(256, 512, 1, 2, 14, 1), Conv(512, 512, 3, 1, 7, 3),
)  # fmt: skip


def runs(conv: Conv) -> dict[str, Callable[[], object]]:
    """The same convolution, in each way."""
    x = torch.randn(PATCHES, conv.inputs, conv.size, conv.size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(conv.outputs, conv.inputs, conv.kernel, conv.kernel) * 0.05

    def plain(dtype: torch.dtype) -> Callable[[], Tensor]:
        a, w = x.to(dtype), weight.to(dtype).contiguous(memory_format=torch.channels_last)
        return lambda: torch.nn.functional.conv2d(a, w, None, conv.stride, conv.kernel // 2).relu_()

    layer = nn.Conv2d(conv.inputs, conv.outputs, conv.kernel, conv.stride, conv.kernel // 2)
    layer.weight.data = weight
    pixels = (x.abs() / 0.02).clamp(max=255).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    return {
        "float32": plain(torch.float32),
        "bfloat16": plain(torch.bfloat16),
        "int8": partial(ByteConv(layer, Scale(0.02), Scale(0.1)), pixels),
    }


@torch.inference_mode()
def convolutions(clock: Clock, rounds: int) -> dict[str, float]:
    """Ratios to float32, of all of them."""
    print("| convolution | times | float32, GMAC/s | bfloat16 | int8 |\n|---|---|---|---|---|")
    total = {"float32": 0.0, "bfloat16": 0.0, "int8": 0.0}
    for conv in TRUNK:
        best = clock.race(runs(conv), rounds)
        for name, seconds in best.items():
            total[name] += conv.times * seconds
        rate = PATCHES * conv.products / conv.times / best["float32"] / 1e9
        shape = f"{conv.inputs} to {conv.outputs}, {conv.kernel} x {conv.kernel} / {conv.stride}, {conv.size} px"
        cells = [f"{best['float32'] / best[name]:.2f}x" for name in ("bfloat16", "int8")]
        print(f"| {shape} | {conv.times} | {rate:.0f} | {' | '.join(cells)} |", flush=True)
    return {name: total["float32"] / seconds for name, seconds in total.items()}


def passes(clock: Clock, rounds: int) -> dict[str, float]:
    """Milliseconds a patch of each way to score 128 patches."""
    official, ours = slide_networks()
    official.eval(), ours.eval()
    images = torch.rand(1, 128, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    first = IPSModel(
        ByteResNet(_trunk(ours), ours.normalise(images[0, :32])), ours.aggregator, dict(ours.heads.items())
    )
    ways: dict[str, Callable[[], object]] = {"official": partial(official.ips, images, 16, 32)}
    for name, model, dtype in (
        ("float32", ours, None),
        ("bfloat16", ours, torch.bfloat16),
        ("int8", first.eval(), None),
    ):
        scorer = Scorer(model, dtype=dtype, batch=16, dedupe=False)
        ways[name] = partial(select, model, [TensorBag(images[0])], 16, 32, scorer=scorer)
    official.ips(images[:, :48], 16, 32)  # nothing is timed cold
    best = {name: 1e3 * seconds / images.shape[1] for name, seconds in clock.race(ways, rounds).items()}
    for name, ms in best.items():
        print(f"| {name} | {ms:.1f} ms a patch | {best['official'] / ms:.2f}x |", flush=True)
    return best


def winners(slides: int, others: int) -> dict[str, dict[str, float]]:
    """Of float32's winners on unseen slides the share found, and the share of patches that are scored again."""
    model = learned(slides).eval()
    unseen = [windows(number, 224, 32) for number in range(1000, 1000 + others)]
    first = ByteResNet(_trunk(model), model.normalise(unseen[0][:64]))
    low = copy.deepcopy(_trunk(model)).bfloat16()
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "bfloat16": lambda x: low(x.bfloat16()).float(),
        "int8": first,
    }
    found: dict[str, dict[str, list[float]]] = {way: {"first": [], "certified": [], "again": []} for way in ways}
    with torch.inference_mode():
        for number, patches in enumerate(unseen):
            exact = _cache(model, _trunk(model), patches)
            truth, _ = exact.winners(MEMORY)
            for way, encode in ways.items():
                cache = _cache(model, encode, patches)
                alone, _ = cache.winners(MEMORY)
                certificate = certified(cache, [TensorBag(patches)], 0, MEMORY, 64, Scorer(model, batch=16))
                mended, _ = cache.winners(MEMORY)
                for name, value in (
                    ("first", float(torch.isin(alone, truth).double().mean())),
                    ("certified", float(torch.isin(mended, truth).double().mean())),
                    ("again", certificate.band / len(patches)),
                ):
                    found[way][name].append(value)
            last = {way: [f"{shares[-1]:.3f}" for shares in each.values()] for way, each in found.items()}
            print(f"  slide {number}, N = {len(patches)}: found, found when certified, again: {last}", flush=True)
    return {way: {name: mean(values) for name, values in each.items()} for way, each in found.items()}


def _cache(model: IPSModel, encode: Callable[[Tensor], Tensor], patches: Tensor) -> LogitCache:
    """Logits of all patches."""
    folded = model.aggregator.folded()  # type: ignore[operator]
    cache = LogitCache(len(patches), len(folded), torch.float32)
    for rows in torch.split(torch.arange(len(patches)), 16):
        cache.add(rows, encode(model.normalise(patches[rows])) @ folded.T)
    return cache


def _trunk(model: IPSModel) -> ResNet:
    assert isinstance(model.encoder, ResNet)
    return model.encoder


def learned(slides: int) -> IPSModel:
    """A ResNet-18 that tells slides with lesions from others by patches of 64 px, 1 micron each."""
    torch.manual_seed(0)
    trunk = ResNet("resnet18")
    statistics = {"mean": (0.75, 0.5, 0.7), "std": (0.2, 0.25, 0.18)}  # the demo's
    heads = {"lesion": linear_head("binary", trunk.dim, 2)}
    model = IPSModel(trunk, Aggregator(trunk.dim, 1, 8, 64, 64, 512), heads, None, **statistics)
    trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    bags = [TensorBag(windows(number, 64, 64)) for number in range(slides)]
    settings = TrainConfig.model_validate(
        {"epochs": 6, "batch_size": 4, "lr": 3e-4, "warmup_epochs": 1, "explore_epochs": 2, "score_dtype": "bfloat16",
         "compute_dtype": "bfloat16"}
    )  # fmt: skip
    each = Slides(
        [len(bag) for bag in bags],
        [{"lesion": float(number % 2)} for number in range(slides)],
        {"lesion": "binary"},
        lambda index, _: bags[index],
    )
    for done in train_steps(
        model, build_optimizer(model, settings), each, settings, SelectConfig(memory=MEMORY), seed=0, start_epoch=0,
        ranks=Ranks(),
    ):  # fmt: skip
        if done.last_of_epoch:
            print(f"  epoch {done.epoch}: loss {done.loss:.3f}", flush=True)
    return model


def windows(number: int, size: int, step: int) -> Tensor:
    """Windows of `size` px of a slide of the demo at 1 micron a px, of which half is tissue -> (N, 3, size, size)."""
    picture = draw_slide((0, 7, number), 2 * (number % 2), number % 3).rgbx
    height, width = (edge // 2 * 2 for edge in picture.shape[:2])
    halved = picture[:height, :width, :3].reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))
    pixels = torch.from_numpy(halved.round().astype("uint8")).permute(2, 0, 1)
    tissue = (pixels.amin(dim=0) < 205).float()
    places = nn.functional.avg_pool2d(tissue[None], size, step)[0] > 0.5
    rows, columns = places.nonzero(as_tuple=True)
    return pixels.unfold(1, size, step).unfold(2, size, step)[:, rows, columns].transpose(0, 1).contiguous()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["convolutions", "pass", "winners"])
    parser.add_argument("--slides", type=int, default=32, help="to learn from")
    parser.add_argument("--unseen", type=int, default=4, help="slides to select from")
    Clock.add_option(parser)
    options = parser.parse_args()
    clock = Clock.from_options(options)
    goals: list[Goal] = []
    ratios = convolutions(clock, options.rounds) if "convolutions" in options.parts else {}
    times = passes(clock, options.rounds) if "pass" in options.parts else {}
    found = winners(options.slides, options.unseen) if "winners" in options.parts else {}
    if found:
        goals.append(Goal("share of float32's winners", found["int8"]["certified"], 0.99))
    if times and found:
        whole = times["int8"] + found["int8"]["again"] * times["float32"]
        goals.append(Goal("of the official loop, with what is scored again", times["official"] / whole, 5.0))
    print(json.dumps({**stamp(), "convolutions": ratios, "ms_a_patch": times, "winners": found}))
    for goal in goals:
        print(f"{'met   ' if goal.met else 'MISSED'}  {goal.name}: {goal.found:.3f}, goal {goal.goal:.3f}")
    return int(not all(goal.met for goal in goals))


if __name__ == "__main__":
    sys.exit(main())
