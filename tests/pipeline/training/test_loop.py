from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ips.bag import Bag, TensorBag
from ips.learning.schedule import parameter_groups
from ips.network.aggregator import Aggregator
from ips.network.heads import Kind, linear_head
from ips.network.model import IPSModel
from pipeline.config.model import SelectConfig, TrainConfig
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.model.checkpoint import Progress, load_checkpoint, save_checkpoint
from pipeline.training.hands import Slides
from pipeline.training.loop import StepDone, train_steps
from pipeline.training.ranks import Ranks

CONFIG = Config.model_validate({"name": "x", "cohort": {"uri": "c"}, "tasks": [{"name": "spot", "column": "label"}]})
SELECT = SelectConfig(memory=3, chunk=7)


class TinyEncoder(nn.Module):
    """(n, 3, 5, 7) -> (n, 8)."""

    dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)).relu().amax(dim=(2, 3))
        return out


def _model() -> IPSModel:
    torch.manual_seed(0)
    aggregator = Aggregator(8, tasks=1, heads=2, key_dim=4, value_dim=4, hidden_dim=16, dropout=0.1)
    return IPSModel(TinyEncoder(), aggregator, {"spot": linear_head("binary", 8, 2)}, None, (0.5,) * 3, (0.25,) * 3)


def _bags(count: int) -> tuple[list[Bag], list[dict[str, float]]]:
    """Bags of 5 to 17 dim noise patches; the positive ones hold one bright patch."""
    generator = torch.Generator().manual_seed(7)
    bags: list[Bag] = []
    targets = []
    for number in range(count):
        patches = torch.randint(0, 90, (5 + 3 * (number % 5), 3, 5, 7), dtype=torch.uint8, generator=generator)
        if number % 2:
            patches[number % len(patches)] = 250
        bags.append(TensorBag(patches))
        targets.append({"spot": float(number % 2)})
    return bags, targets


def _slides(count: int = 11) -> Slides:
    bags, targets = _bags(count)
    return Slides([len(bag) for bag in bags], targets, {"spot": "binary"}, partial(_open, bags))


def _open(bags: Sequence[Bag], index: int, _epoch: int) -> Bag:
    return bags[index]


def _run(model: IPSModel, optimizer: torch.optim.Optimizer, settings: TrainConfig, start: int = 0) -> list[StepDone]:
    steps = train_steps(model, optimizer, _slides(), settings, SELECT, seed=3, start_epoch=start, ranks=Ranks())
    return list(steps)


def _optimizer(model: IPSModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, 0.01), lr=1.0)


def test_training_learns_the_bright_patch() -> None:
    model = _model()
    steps = _run(model, _optimizer(model), TrainConfig(epochs=30, batch_size=4, lr=1e-2, warmup_epochs=2))
    assert [step.step for step in steps] == list(range(1, 91))
    assert [step.last_of_epoch for step in steps] == [False, False, True] * 30
    assert sum(step.slides for step in steps) == 11 * 30
    assert sum(step.patches for step in steps) == sum(_slides().sizes) * 30
    assert sum(step.loss for step in steps[:6]) / 6 > 0.5
    assert sum(step.loss for step in steps[-6:]) / 6 < 0.1
    assert steps[-1].lr < 1e-4


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    settings = TrainConfig(epochs=4, batch_size=4, lr=1e-2, warmup_epochs=1)
    whole = _model()
    losses = [step.loss for step in _run(whole, _optimizer(whole), settings)]

    first = _model()
    optimizer = _optimizer(first)
    for step in train_steps(first, optimizer, _slides(), settings, SELECT, seed=3, start_epoch=0, ranks=Ranks()):
        if step.last_of_epoch and step.epoch == 1:
            save_checkpoint(tmp_path, first, optimizer, CONFIG, Progress(2, step.step, "plan"))
            break
    torch.randn(5)  # a new process has another RNG state
    second = _model()
    optimizer = _optimizer(second)
    progress = load_checkpoint(tmp_path, second, optimizer, "plan")
    resumed = [step.loss for step in _run(second, optimizer, settings, start=progress.epoch)]

    assert resumed == losses[-len(resumed) :]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_two_ranks_sum_to_the_step_of_one() -> None:
    """Both ranks' gradients, computed one after the other, sum to the gradient of one rank with the whole batch."""
    settings = TrainConfig(epochs=1, batch_size=11, lr=1e-9, warmup_epochs=0, clip_norm=None, weight_decay=0)
    gradients: dict[int, dict[str, Tensor]] = {}
    losses: dict[int, float] = {}
    for world_size in (1, 2):
        total: dict[str, Tensor] = {}
        loss = 0.0
        for rank in range(world_size):
            model = _model()
            model.aggregator.eval()
            for module in model.modules():  # batch statistics differ by composition: freeze them for the comparison
                if isinstance(module, nn.BatchNorm2d | nn.Dropout):
                    module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
                    module.training = False
            ranks = Ranks(rank, world_size, lambda _tensor: None)
            bags, targets = _bags(11)
            slides = Slides([len(b) for b in bags], targets, {"spot": "binary"}, partial(_open, bags))
            (step,) = train_steps(
                model,
                torch.optim.SGD(model.parameters(), 1.0),
                slides,
                settings,
                SELECT,
                seed=3,
                start_epoch=0,
                ranks=ranks,
            )
            loss += step.loss
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                total[name] = total.get(name, torch.zeros_like(parameter)) + parameter.grad
        gradients[world_size], losses[world_size] = total, loss
    assert math.isclose(losses[1], losses[2], rel_tol=1e-6)
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[2][name], gradient, rtol=1e-3, atol=1e-6)


def test_a_rank_without_slides_takes_the_same_step() -> None:
    bags, targets = _bags(2)
    slides = Slides([len(b) for b in bags], targets, {"spot": "binary"}, partial(_open, bags))
    model = _model()
    before = copy.deepcopy(model.state_dict())
    settings = TrainConfig(epochs=1, batch_size=2, warmup_epochs=0, weight_decay=0)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)

    def one_other_contributes(tensor: Tensor) -> None:
        if tensor.shape == (1,):
            tensor.fill_(1.0)

    ranks = Ranks(2, 3, one_other_contributes)  # two slides for three ranks: the third has none
    (step,) = train_steps(model, optimizer, slides, settings, SELECT, seed=0, start_epoch=0, ranks=ranks)
    assert step.loss == 0.0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_loss_that_is_not_finite_stops_with_step_slides_and_rate() -> None:
    bags, targets = _bags(4)
    slides = Slides([len(b) for b in bags], targets, {"spot": "binary"}, partial(_open, bags))
    model = _model()
    with torch.no_grad():
        model.heads["spot"].weight.fill_(float("inf"))  # type: ignore[operator]
    settings = TrainConfig(epochs=1, batch_size=4, warmup_epochs=0)
    with pytest.raises(
        StageError, match=r"loss became nan at step 1 \(epoch 1, lr 0.001, slides 3, 2, 1, 0\).*train.lr"
    ):
        list(train_steps(model, _optimizer(model), slides, settings, SELECT, seed=0, start_epoch=0, ranks=Ranks()))


def test_every_kind_of_task_trains_at_once_and_missing_labels_add_nothing() -> None:
    kinds: dict[str, Kind] = {"b": "binary", "m": "multiclass", "l": "multilabel", "r": "regression", "s": "survival"}
    widths = {"b": 1, "m": 3, "l": 2, "r": 1, "s": 4}
    bags, _ = _bags(6)
    rows: list[dict[str, float | tuple[float, ...]]] = [
        {"b": i % 2, "m": i % 3, "l": (1.0, i % 2), "r": 0.5 * i, "s": (i % 4, 1.0)} for i in range(6)
    ]
    nothing: dict[str, float | tuple[float, ...]] = {
        "b": math.nan,
        "m": math.nan,
        "l": (math.nan, math.nan),
        "r": math.nan,
        "s": (math.nan, math.nan),
    }
    rows[2] = {**nothing, "b": 1.0}
    settings = TrainConfig(epochs=1, batch_size=6, warmup_epochs=0)
    losses = {}
    for weight in (1.0, 5.0):
        torch.manual_seed(0)
        aggregator = Aggregator(8, tasks=5, heads=2, key_dim=4, value_dim=4, hidden_dim=16, dropout=0.0)
        heads = {task: nn.Linear(8, width) for task, width in widths.items()}
        model = IPSModel(TinyEncoder(), aggregator, heads, None, (0.5,) * 3, (0.25,) * 3)
        weights = {"m": torch.tensor([weight, 1.0, 1.0])}
        slides = Slides([len(b) for b in bags], rows, kinds, partial(_open, bags), weights)
        (step,) = train_steps(model, _optimizer(model), slides, settings, SELECT, seed=0, start_epoch=0, ranks=Ranks())
        losses[weight] = step.loss
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.heads.parameters())
    assert losses[1.0] != losses[5.0]


def test_missing_labels_of_one_task_do_not_change_its_mean() -> None:
    bags, targets = _bags(5)
    targets[0]["spot"] = math.nan
    slides = Slides([len(b) for b in bags], targets, {"spot": "binary"}, partial(_open, bags))
    known = Slides(slides.sizes[1:], targets[1:], slides.kinds, partial(_open, bags[1:]))
    settings = TrainConfig(epochs=1, batch_size=5, warmup_epochs=0, clip_norm=None)
    losses = []
    for some in (slides, known):
        model = _model()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.encoder.norm = nn.Identity()
        (step,) = train_steps(model, _optimizer(model), some, settings, SELECT, seed=0, start_epoch=0, ranks=Ranks())
        losses.append(step.loss)
    assert math.isclose(losses[0], losses[1], rel_tol=1e-5)
