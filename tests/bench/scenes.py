"""What the benchmarks run on: the paper's Megapixel-MNIST network, its images, and bags of any length."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ips.bag import Chunk
from ips.network.aggregator import Aggregator
from ips.network.encoder import ResNet
from ips.network.model import IPSModel
from ips.network.official import load_official
from ips.network.positions import IndexPositions
from tests.oracle import OfficialNet

TASKS = ("majority", "max", "top", "multi")
MNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"
_DIGITS = "t10k-images-idx3-ubyte.gz"


def megapixel_networks(N: int) -> tuple[OfficialNet, IPSModel]:
    """The official network (ResNet-18, 2 stages, H = 8, T = 4, D = 128) and ours, with the same weights."""
    torch.manual_seed(0)
    official = OfficialNet(ResNet("resnet18", 2, 1), TASKS, 10, H=8, D_k=16, D_v=16, D_inner=512, N=N)
    trunk = ResNet("resnet18", 2, 1)
    heads = {task: nn.Linear(trunk.dim, 10) for task in TASKS}
    ours = IPSModel(trunk, Aggregator(trunk.dim, 4, 8, 16, 16, 512), heads, IndexPositions(trunk.dim))
    load_official(ours, official.state_dict())
    return official, ours


def slide_networks() -> tuple[OfficialNet, IPSModel]:
    """The official traffic-sign network (ResNet-18, H = 8, T = 1, D = 512) and ours, with the same weights."""
    torch.manual_seed(0)
    official = OfficialNet(ResNet("resnet18"), ["sign"], 4, H=8, D_k=64, D_v=64, D_inner=2048)
    trunk = ResNet("resnet18")
    ours = IPSModel(trunk, Aggregator(trunk.dim, 1, 8, 64, 64, 2048), {"sign": nn.Linear(trunk.dim, 4)})
    load_official(ours, official.state_dict())
    return official, ours


def add_mnist_option(parser: argparse.ArgumentParser) -> None:
    """`--mnist`."""
    parser.add_argument("--mnist", type=Path, default=MNIST, help="folder of MNIST's idx files, gzipped")


def check_mnist(parser: argparse.ArgumentParser, folder: Path) -> None:
    """End with a clear line where the digits of `megapixel_images` are not there."""
    if not (folder / _DIGITS).is_file():
        parser.error(f"{folder} has no {_DIGITS}; name a folder with MNIST's idx files: --mnist FOLDER")


def megapixel_images(count: int, *, folder: Path = MNIST, size: int = 1500, patch: int = 50, seed: int = 0) -> Tensor:
    """Images as the paper makes them: 50 strokes, then 5 MNIST digits on black -> (count, N, 1, patch, patch), 0..1.

    Pictures, places and order are the paper's (`pipeline.bags.images`), its random numbers are not, and digits are of
    any class. The same number of patches holds something, so as many are encoded: 107 of 900 an image.
    """
    raw = gzip.decompress((folder / _DIGITS).read_bytes())
    digits = torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).view(-1, 28, 28).float() / 255
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    strokes = _strokes(50, generator)
    images = torch.zeros(count, size, size)
    for image in images:
        shapes = torch.cat((strokes[draw(50, 50)], digits[draw(len(digits), 5)]))
        places = torch.cat((28 + draw(size - 56, 50, 2), draw(size - 27, 5, 2)))
        for shape, (y, x) in zip(shapes, places.tolist(), strict=True):
            image[y : y + 28, x : x + 28] = shape  # each covers what lies below
    tiles = images.unfold(1, patch, patch).unfold(2, patch, patch)
    return tiles.reshape(count, -1, 1, patch, patch)


def _strokes(count: int, generator: torch.Generator) -> Tensor:
    """(count, 28, 28): two straight lines through a corner each, some mirrored, every px of its own brightness."""
    lines = torch.zeros(count, 28, 28, dtype=torch.bool)
    for line, slope in zip(lines, (torch.rand(count, generator=generator) * math.pi / 2.5).tan().tolist(), strict=True):
        x = torch.linspace(0, min(27.49, 27.49 / max(slope, 1e-9)), 56)
        line[x.round().long(), (slope * x).round().long()] = True
    second = lines[torch.randperm(count, generator=generator)]
    for _ in range(2):  # both times the same axis, the official script's way
        flipped = torch.rand(count, generator=generator) < 0.33
        second[flipped] = second[flipped].flip(2)
    return (lines | second) * (torch.rand(count, 28, 28, generator=generator) * 0.2 + 0.8)


class EndlessBag:
    """N uint8 patches in constant memory on the host: one of 251 images, its pixels shifted by the row number."""

    def __init__(self, N: int, shape: tuple[int, int, int], seed: int) -> None:
        self.N = N
        generator = torch.Generator().manual_seed(seed)
        self._base = torch.randint(0, 256, (251, *shape), dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return self.N

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Rows in order."""
        for start in range(0, self.N, size):
            yield self.take(torch.arange(start, min(start + size, self.N)))

    def take(self, rows: Tensor) -> Chunk:
        """Any rows."""
        shift = (rows // 251 % 256).to(torch.uint8).view(-1, 1, 1, 1)
        return Chunk(self._base[rows % 251] + shift, rows)


@dataclass(frozen=True)
class Clock:
    """How runs are timed: on the wall with all cores, or by the process's own CPU time with one thread."""

    cpu_time: bool

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Clock:
        """Set the number of threads too."""
        torch.set_num_threads(1 if options.cpu_time else os.cpu_count() or 1)
        return cls(options.cpu_time)

    @staticmethod
    def add_option(parser: argparse.ArgumentParser) -> None:
        """`--cpu-time`."""
        help_text = "CPU time of one thread instead of wall time: for machines that others use too"
        parser.add_argument("--cpu-time", action="store_true", help=help_text)

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one run."""
        now = time.process_time if self.cpu_time else time.perf_counter
        _wait()
        start = now()
        run()
        _wait()
        return now() - start

    def race(self, runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        """The fastest of `rounds` of each run; all take turns, so that a busy machine hurts them alike."""
        best = dict.fromkeys(runs, math.inf)
        for _ in range(rounds):
            for name, run in runs.items():
                best[name] = min(best[name], self.seconds(run))
        return best


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def multiplications(encoder: nn.Module, patches: Tensor) -> int:
    """Multiply-adds the convolutions of `encoder` need for one of patches (n, C, h, w); taps on padding are none."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d)
        assert isinstance(layer.padding, tuple)
        ones, kernel = torch.ones(1, 1, *inputs[0].shape[2:]), torch.ones(1, 1, *layer.kernel_size)
        taps = nn.functional.conv2d(ones, kernel, stride=layer.stride, padding=layer.padding).sum()
        total += int(taps) * layer.in_channels * layer.out_channels

    hooks = [layer.register_forward_hook(count) for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        encoder(patches[:1])
    for hook in hooks:
        hook.remove()
    return total


def product_rate(dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    """Multiply-adds a second of a matrix product of `dtype`: what no convolution without Winograd can pass."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return size**3 / clock.race({"product": lambda: nn.functional.linear(a, b)}, 9)["product"]


@dataclass(frozen=True)
class Goal:
    """A ratio to reach."""

    name: str
    found: float
    goal: float

    @property
    def met(self) -> bool:
        """Whether it was."""
        return self.found >= self.goal


def verdict(goals: Sequence[Goal], table: Mapping[str, object], clock: Clock) -> int:
    """Print measured against goal, then everything as one line of JSON; 1 when a goal is missed."""
    print()
    for goal in goals:
        print(f"{'met   ' if goal.met else 'MISSED'}  {goal.name}: {goal.found:.2f}x, goal {goal.goal:g}x")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts = {
        "device": device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clock": "cpu time" if clock.cpu_time else "wall",
    }
    outcome = [{**asdict(goal), "met": goal.met} for goal in goals]
    print(json.dumps({**facts, "table": table, "goals": outcome}))
    return int(not all(goal.met for goal in goals))
