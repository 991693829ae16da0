"""What the benchmarks run on: the paper's Megapixel-MNIST network, its images, and bags of any length."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ips.aggregator import Aggregator
from ips.bag import Chunk
from ips.encoder import ResNet
from ips.model import IPSModel
from ips.official import load_official
from ips.positions import IndexPositions
from tests.oracle import OfficialNet

TASKS = ("majority", "max", "top", "multi")
MNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"


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


def megapixel_images(count: int, *, folder: Path = MNIST, size: int = 1500, patch: int = 50, seed: int = 0) -> Tensor:
    """Images as the paper makes them: 5 MNIST digits and 50 strokes on black -> patches (count, N, 1, 50, 50), 0..1.

    The placing follows the paper's recipe, not its random numbers.
    """
    raw = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    digits = torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).view(-1, 28, 28).float() / 255
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, n: int) -> list[int]:
        return torch.randint(0, high, (n,), generator=generator).tolist()

    images = torch.zeros(count, size, size)
    for image in images:
        shapes = [digits[n] for n in draw(len(digits), 5)]
        shapes += [_stroke(torch.rand(3, generator=generator)) for _ in range(50)]
        for shape, x, y in zip(shapes, draw(size - 28, 55), draw(size - 28, 55), strict=True):
            image[y : y + 28, x : x + 28] = torch.maximum(image[y : y + 28, x : x + 28], shape)
    tiles = images.unfold(1, patch, patch).unfold(2, patch, patch)
    return tiles.reshape(count, -1, 1, patch, patch)


def _stroke(dice: Tensor) -> Tensor:
    """A slanted line of random intensity across 28 px."""
    angle, offset, strength = (dice * torch.tensor([3.14159, 10.0, 0.9]) + torch.tensor([0.0, 9.0, 0.1])).tolist()
    y, x = torch.meshgrid(torch.arange(28.0) - 14, torch.arange(28.0) - 14, indexing="ij")
    line = torch.sin(torch.tensor(angle)) * x + torch.cos(torch.tensor(angle)) * y
    stroke: Tensor = ((line - offset + 14).abs() < 1.5) * strength
    return stroke


class EndlessBag:
    """N different uint8 patches in constant memory: one of 251 images, its pixels shifted by the row number."""

    def __init__(self, N: int, shape: tuple[int, int, int], seed: int, device: torch.device) -> None:
        self.N = N
        generator = torch.Generator().manual_seed(seed)
        self._base = torch.randint(0, 256, (251, *shape), dtype=torch.uint8, generator=generator).to(device)

    def __len__(self) -> int:
        return self.N

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Rows in order."""
        for start in range(0, self.N, size):
            yield self.take(torch.arange(start, min(start + size, self.N)))

    def take(self, rows: Tensor) -> Chunk:
        """Any rows."""
        at = rows.to(self._base.device)
        shift = (at // 251 % 256).to(torch.uint8).view(-1, 1, 1, 1)
        return Chunk(self._base[at % 251] + shift, rows)


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """The fastest of `repeats` runs, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def verdict(goals: list[tuple[str, float, float]]) -> int:
    """Print measured against goal; 1 when one is missed."""
    for name, found, goal in goals:
        print(f"{'met   ' if found >= goal else 'MISSED'}  {name}: {found:.2f}x, goal {goal:g}x")
    return int(any(found < goal for _, found, goal in goals))
