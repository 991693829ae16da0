"""Small networks and bags for the tests of `ips`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ips.bag import Chunk, TensorBag
from ips.network.aggregator import Aggregator
from ips.network.encoder import ResNet
from ips.network.model import IPSModel
from ips.network.part import PatchEncoder
from ips.network.positions import GridPositions


class TinyEncoder(PatchEncoder):
    """(n, C, h, w) -> (n, D): pooled pixels through one linear layer, batch norm and dropout."""

    channels: int

    def __init__(self, dim: int, channels: int = 3) -> None:
        super().__init__()
        self.dim, self.channels = dim, channels
        self.linear = nn.Linear(channels * 16, dim)
        self.bn = nn.BatchNorm1d(dim)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(x, (4, 4)).flatten(1)
        out: Tensor = self.dropout(self.bn(self.linear(pooled)).relu())
        return out


def model_of(
    encoder: nn.Module, dim: int, *, tasks: int = 2, heads: int = 3, grid: bool = False, scale: float = 1.0
) -> IPSModel:
    """`scale` multiplies the queries: large ones make attention sharp, so that heads disagree."""
    aggregator = Aggregator(dim, tasks, heads, key_dim=5, value_dim=7, hidden_dim=11, dropout=0.1)
    with torch.no_grad():
        aggregator.attention.queries.mul_(scale)
    names = [f"task.{i}" for i in range(tasks)]
    position = GridPositions(dim) if grid else None
    layers = {name: nn.Linear(dim, i + 1) for i, name in enumerate(names)}
    return IPSModel(encoder, aggregator, layers, position, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def tiny_model(*, tasks: int = 2, heads: int = 3, grid: bool = False, scale: float = 20.0, seed: int = 0) -> IPSModel:
    torch.manual_seed(seed)
    return model_of(TinyEncoder(12), 12, tasks=tasks, heads=heads, grid=grid, scale=scale)


def resnet_model(
    name: str = "resnet18", stages: Literal[2, 4] = 2, *, grid: bool = False, scale: float = 20.0
) -> IPSModel:
    """A ResNet whose batch norms have statistics and gains worth fusing."""
    torch.manual_seed(1)
    encoder = ResNet(name, stages)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model_of(encoder, encoder.dim, grid=grid, scale=scale)


def bag_of(n: int, seed: int = 0, *, h: int = 13, w: int = 17, grid: bool = False) -> TensorBag:
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=generator)
    # a colour cast of its own makes patches differ more than independent noise would
    cast = torch.rand(n, 3, 1, 1, generator=generator)
    positions = torch.randint(0, 90, (n, 2), generator=generator).float() if grid else None
    return TensorBag((patches * cast).to(torch.uint8), positions)


class LooseBag:
    """A bag whose chunks come in any order and size, for the invariances."""

    def __init__(self, bag: TensorBag, order: Tensor, sizes: Callable[[], int] | None = None) -> None:
        self.bag, self.order, self.sizes = bag, order, sizes

    def __len__(self) -> int:
        return len(self.bag)

    def chunks(self, size: int) -> Iterator[Chunk]:
        start = 0
        while start < len(self.order):
            step = size if self.sizes is None else self.sizes()
            yield self.take(self.order[start : start + step])
            start += step

    def take(self, rows: Tensor) -> Chunk:
        return self.bag.take(rows)
