"""The training loop: a generator of steps. It knows neither Ray nor MLflow; draining it trains the model.

One step: select without gradients (paper Algorithm 1), encode the M winners of each slide with gradients,
aggregate, one loss on logits, one optimiser step. Over several ranks gradients are summed and the loss is
normalised by the global count, so the same global batch gives the same step on any number of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ips.bag import Bag
from ips.baselines import random_selection
from ips.heads import Kind
from ips.losses import LossSum, mean_loss, task_loss
from ips.model import IPSModel
from ips.schedule import warmup_cosine
from ips.scorer import Scorer
from ips.select import gather, select
from pipeline.config_model import SelectConfig, TrainConfig
from pipeline.errors import StageError
from pipeline.plan import Step, epoch_plan, steps_per_epoch
from pipeline.ranks import Ranks, average_statistics, sum_gradients

_DIVERGED = "lower train.lr or set train.clip_norm; the last checkpoint is kept"
LR_FLOOR = 1e-3  # the cosine ends at lr / 1000 (official code)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Slides:
    """The training slides, by index: how many patches each has, its targets, and how to open its bag."""

    sizes: Sequence[int]
    targets: Sequence[Mapping[str, float | tuple[float, ...]]]
    """Task -> what `ips.losses.task_loss` reads of one slide; NaN where the label is missing."""
    kinds: Mapping[str, Kind]
    """Task -> kind of its loss."""
    bag: Callable[[int, int], Bag]
    """(slide index, epoch) -> bag, augmented for that epoch."""
    class_weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Task -> (K,), for tasks whose classes weigh differently."""


@dataclass(frozen=True)
class StepDone:
    """One optimiser step, as all ranks see it."""

    epoch: int
    step: int
    """Steps taken so far, this one included."""
    last_of_epoch: bool
    loss: float
    lr: float
    slides: int
    patches: int
    seconds: float


def train_steps(
    model: IPSModel,
    optimizer: torch.optim.Optimizer,
    slides: Slides,
    settings: TrainConfig,
    selecting: SelectConfig,
    *,
    seed: int,
    start_epoch: int,
    ranks: Ranks,
) -> Iterator[StepDone]:
    """Train from `start_epoch` to `settings.epochs`; StageError when the loss is not finite."""
    per_epoch = steps_per_epoch(len(slides.sizes), settings.batch_size)
    warmup, total = round(settings.warmup_epochs * per_epoch), settings.epochs * per_epoch
    scorer = Scorer(model, dtype=_DTYPES[settings.score_dtype])
    for epoch in range(start_epoch, settings.epochs):
        plan = epoch_plan(
            slides.sizes, batch_size=settings.batch_size, world_size=ranks.world_size, seed=seed, epoch=epoch
        )
        for number, hands in enumerate(plan):
            began = time.perf_counter()
            step = epoch * per_epoch + number
            lr = settings.lr * warmup_cosine(step, warmup, total, LR_FLOOR)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed((seed * 1_000_003 + step) * 1009 + ranks.rank)
            taken = [index for hand in hands for index in hand]
            where = f"step {step + 1} (epoch {epoch + 1}, lr {lr:g}, slides {taken})"
            try:
                loss = _step(scorer, optimizer, slides, hands, settings, selecting, epoch=epoch, ranks=ranks)
            except ValueError as error:  # `ips` refuses patches and logits that are not finite
                raise StageError(f"{error}, at {where}; {_DIVERGED}") from error
            if not math.isfinite(loss):
                raise StageError(f"the loss became {loss} at {where}; {_DIVERGED}")
            patches = sum(slides.sizes[index] for index in taken)
            seconds = time.perf_counter() - began
            yield StepDone(epoch, step + 1, number + 1 == len(plan), loss, lr, len(taken), patches, seconds)


def _step(
    scorer: Scorer,
    optimizer: torch.optim.Optimizer,
    slides: Slides,
    hands: Step,
    settings: TrainConfig,
    selecting: SelectConfig,
    *,
    epoch: int,
    ranks: Ranks,
) -> float:
    """One optimiser step on this rank's hand; the loss over all hands."""
    model = scorer.model
    model.train()
    optimizer.zero_grad(set_to_none=True)
    device, mine = model.mean.device, hands[ranks.rank]
    loss = torch.zeros((), device=device)
    if mine:
        bags = [slides.bag(index, epoch) for index in mine]
        compute = _DTYPES[settings.compute_dtype]
        if epoch < settings.explore_epochs:
            winners = random_selection(bags, selecting.memory, torch.default_generator)
        else:
            winners = select(model, bags, selecting.memory, selecting.chunk, selecting.mode, scorer=scorer)
        batch = gather(bags, winners, device)
        with torch.autocast(device.type, compute, enabled=compute != torch.float32):
            outputs = model(batch)
        loss = _loss(outputs, slides, mine, [index for hand in hands for index in hand])
        loss.backward()  # type: ignore[no-untyped-call]
    total = loss.detach().clone()
    ranks.sum_(total)
    sum_gradients(model, ranks)
    average_statistics(model, ranks, weight=float(bool(mine)))
    if settings.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    optimizer.step()
    scorer.refresh()
    return float(total)


def _loss(outputs: Mapping[str, Tensor], slides: Slides, mine: Sequence[int], everyone: Sequence[int]) -> Tensor:
    """Mean over tasks of the loss of this rank's slides over the weight of the labelled slides of all ranks.

    Summed over ranks it is the loss of the whole batch; a task without any label in the batch adds 0.
    """
    sums = _sums(outputs, slides, mine)
    blank = {task: torch.zeros(len(everyone), logits.shape[1]) for task, logits in outputs.items()}
    weights = {task: whole.weight for task, whole in _sums(blank, slides, everyone).items()}
    return mean_loss({task: LossSum(sums[task].total, weights[task].to(sums[task].total)) for task in sums})


def _sums(outputs: Mapping[str, Tensor], slides: Slides, which: Sequence[int]) -> dict[str, LossSum]:
    targets = {task: torch.tensor([slides.targets[i][task] for i in which]) for task in slides.kinds}
    return task_loss(outputs, targets, slides.kinds, slides.class_weights)
