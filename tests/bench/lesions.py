"""Cohorts of features in which the answer lies in few patches, or in how many: what selection and context are tried on.

A patch has two properties or one or none of them, in directions that are the same for all slides, beside noise and the
tint of its slide. A lesion has both, and something of its own. In every slide as many patches have the one property as
the other, so these say nothing of a slide, and look-alikes stand beside what decides.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ips.bag import Chunk, TensorBag
from ips.network.aggregator import Aggregator
from ips.network.heads import linear_head
from ips.network.model import IPSModel
from ips.selection.baselines import every_patch
from ips.selection.select import gather, select
from pipeline.config.model import SelectConfig, TrainConfig
from pipeline.model.build import build_optimizer
from pipeline.training.hands import Slides
from pipeline.training.loop import StepDone, train_steps
from pipeline.training.ranks import Ranks
from pipeline.training.winners import Winners

WIDTH, DIM = 32, 64
TASK = "answer"


class Counted(TensorBag):
    """Counts the bytes that are read."""

    read = 0

    def chunks(self, size: int) -> Iterator[Chunk]:
        """As those of a `TensorBag`."""
        for chunk in super().chunks(size):
            self.read += chunk.patches.nbytes
            yield chunk

    def take(self, rows: Tensor) -> Chunk:
        """As that of a `TensorBag`."""
        chunk = super().take(rows)
        self.read += chunk.patches.nbytes
        return chunk


@dataclass(frozen=True)
class Law:
    """Of a cohort: patches of a slide, and how many of them are lesions in either class, uniformly."""

    patches: tuple[int, int]
    lesions: tuple[tuple[float, float], tuple[float, float]]
    """Shares of the patches, by class."""
    marked: float
    """Share of the patches that have the one property, and of those that have the other."""
    contrast: float = 2.5
    """Of a property, in deviations of the noise."""
    own: float = 0.0
    """Of lesions in a direction of their own, as features of a large network have it."""


@dataclass
class Cohort:
    """Slides with an answer."""

    bags: list[Counted] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Bytes, so far."""
        return sum(bag.read for bag in self.bags)


def draw(law: Law, slides: int, seed: int) -> Cohort:
    """Half of them of either class."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0][:3]
    cohort = Cohort()
    for number in range(slides):
        label = number % 2
        N = int(torch.randint(law.patches[0], law.patches[1] + 1, (), generator=generator))
        low, high = law.lesions[label]
        lesions = round(N * float(low + (high - low) * torch.rand((), generator=generator)))
        alone = max(0, round(N * law.marked) - lesions)
        x = torch.randn(N, WIDTH, generator=generator) + 0.5 * torch.randn(WIDTH, generator=generator)
        order = torch.randperm(N, generator=generator)
        first, second = order[: lesions + alone], order[torch.arange(N) >= lesions + alone][:alone]
        x[first] += law.contrast * directions[0]
        x[torch.cat((order[:lesions], second))] += law.contrast * directions[1]
        x[order[:lesions]] += law.own * directions[2]
        cohort.bags.append(Counted(x))
        cohort.labels.append(label)
    return cohort


class Projector(nn.Module):
    """Two layers, small enough to train on any machine."""

    inputs, dim = WIDTH, DIM

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, DIM), nn.ReLU(), nn.Linear(DIM, DIM), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(n, F) -> (n, D)."""
        y: Tensor = self.layers(x)
        return y


def network(seed: int) -> IPSModel:
    """The paper's aggregator around it."""
    torch.manual_seed(seed)
    return IPSModel(Projector(), Aggregator(DIM, 1, 8, 8, 8, 128), {TASK: linear_head("binary", DIM, 2)})


def trained(
    cohort: Cohort,
    settings: TrainConfig,
    selecting: SelectConfig,
    seed: int,
    after: Callable[[StepDone], None] = lambda _: None,
    watch: Callable[[IPSModel], None] = lambda _: None,
) -> IPSModel:
    """A network that has learned from the cohort, by the product's own loop; told of every step, and shown after it."""
    sizes = [len(bag) for bag in cohort.bags]
    slides = Slides(
        sizes, [{TASK: float(label)} for label in cohort.labels], {TASK: "binary"}, lambda index, _: cohort.bags[index]
    )
    model, every = network(seed), settings.reselect_every
    winners = Winners(sizes, selecting.memory, every) if every > 1 else None
    for done in train_steps(
        model, build_optimizer(model, settings), slides, settings, selecting,
        seed=seed, start_epoch=0, ranks=Ranks(), winners=winners,
    ):  # fmt: skip
        after(done)
        watch(model)
    return model


@torch.no_grad()
def auc(model: IPSModel, cohort: Cohort, selecting: SelectConfig) -> float:
    """Of the answers to all slides, each scored whole."""
    model.eval()
    scores = []
    for bag in cohort.bags:
        if selecting.mode == "every":
            found = every_patch([bag])
        else:
            pools = selecting.context == "all"
            found = select(
                model,
                [bag],
                selecting.memory,
                selecting.chunk,
                context="rest" if pools else None,
                rank=selecting.rank,
            )
        scores.append(float(model(gather([bag], found, "cpu"))[TASK]))
    values, labels = torch.tensor(scores), torch.tensor(cohort.labels)
    over = values[labels == 1].unsqueeze(1) - values[labels == 0]
    return float((over > 0).double().mean() + 0.5 * (over == 0).double().mean())


def mean_and_spread(values: Sequence[float]) -> str:
    """As a cell of a table."""
    found = torch.tensor(values, dtype=torch.float64)
    spread = found.std(correction=min(1, len(found) - 1))
    return f"{found.mean():.3f} ± {spread:.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def stamp() -> dict[str, str]:
    """When and where."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    cpu = names[0] if names else platform.machine()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{torch.get_num_threads()} of {os.cpu_count()} cores of {cpu}, torch {torch.__version__}",
    }
