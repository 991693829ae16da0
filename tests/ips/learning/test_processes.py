"""Two gloo processes that train one model, against one process with all images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from ips.bag import TensorBag
from ips.learning.gradient import bounded_backward
from ips.learning.losses import mean_loss, task_loss
from ips.learning.processes import average_gradients, average_statistics
from ips.network.aggregator import Aggregator
from ips.network.encoder import ResNet
from ips.network.heads import linear_head
from ips.network.model import IPSModel, unwrapped
from ips.selection.scorer import Scorer
from ips.selection.select import gather, select
from tests.gloo import one_of_two
from tests.ips.nets import TinyEncoder, bag_of

LABELS = torch.tensor([1.0, 0.0, 0.0, 1.0])


def _model() -> IPSModel:
    """Frozen statistics and no dropout, so that an image's gradient does not depend on the others of its process."""
    torch.manual_seed(0)
    aggregator = Aggregator(12, 1, 2, 3, 3, 5, dropout=0.0)
    model = IPSModel(TinyEncoder(12), aggregator, {"er": linear_head("binary", 12, 2)}).double().train()
    model.encoder.eval()
    return model


def _bags() -> list[TensorBag]:
    return [bag_of(n, n) for n in (9, 3, 11, 7)]


def _plain(model: nn.Module, bags: list[TensorBag], labels: Tensor) -> None:
    outputs = model(gather(bags, select(model, bags, 4, 5), "cpu"))
    mean_loss(task_loss(outputs, {"er": labels}, unwrapped(model).kinds)).backward()  # type: ignore[no-untyped-call]


def _bounded(model: nn.Module, bags: list[TensorBag], labels: Tensor) -> None:
    def loss(outputs: dict[str, Tensor]) -> Tensor:
        return mean_loss(task_loss(outputs, {"er": labels}, {"er": "binary"}))

    bounded_backward(model, bags, select(model, bags, 4, 5), loss, 3)


def _with_context(model: nn.Module, bags: list[TensorBag], labels: Tensor) -> None:
    outputs = model(gather(bags, select(model, bags, 4, 5, context="rest"), "cpu"))
    mean_loss(task_loss(outputs, {"er": labels}, unwrapped(model).kinds)).backward()  # type: ignore[no-untyped-call]


def _with_context_bounded(model: nn.Module, bags: list[TensorBag], labels: Tensor) -> None:
    def loss(outputs: dict[str, Tensor]) -> Tensor:
        return mean_loss(task_loss(outputs, {"er": labels}, {"er": "binary"}))

    bounded_backward(model, bags, select(model, bags, 4, 5, context="rest"), loss, 3)


def _accumulated(model: nn.Module, bags: list[TensorBag], labels: Tensor) -> None:
    """One image at a time; exchanged with the last."""
    assert isinstance(model, DistributedDataParallel)
    with model.no_sync():
        _bounded(model, bags[:1], labels[:1])
    _bounded(model, bags[1:], labels[1:])
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad /= 2


def _alone(model: nn.Module, bags: list[TensorBag], labels: Tensor) -> None:
    """Without DistributedDataParallel."""
    assert isinstance(model, DistributedDataParallel)
    _bounded(model.module, bags, labels)
    average_gradients(model.module)


STEPS: dict[str, Callable[[nn.Module, list[TensorBag], Tensor], None]] = {
    "plain": _plain, "bounded": _bounded, "accumulated": _accumulated, "alone": _alone,
    "context": _with_context, "context bounded": _with_context_bounded,
}  # fmt: skip


def _worker(rank: int, folder: str) -> None:
    with one_of_two(rank, folder):
        _together(rank, folder)
        dist.barrier()  # who leaves early resets the connection that another still reads from


def _together(rank: int, folder: str) -> None:
    mine = slice(2 * rank, 2 * rank + 2)
    for name, step in STEPS.items():
        model = DistributedDataParallel(_model())
        for _ in range(2):  # once more, as a loop does
            model.zero_grad()
            step(model, _bags()[mine], LABELS[mine])
        torch.save({n: p.grad for n, p in model.module.named_parameters()}, f"{folder}/{name}-{rank}.pt")
    moved = DistributedDataParallel(_model().train())
    bounded_backward(moved, _bags()[mine], select(moved, _bags()[mine], 4, 5), lambda out: out["er"].sum(), 4, "group")
    torch.save(dict(moved.module.encoder.named_buffers()), f"{folder}/statistics-{rank}.pt")
    _check_collectives(rank)
    _check_learning_norms(rank)


def _check_learning_norms(rank: int) -> None:
    """A wrapped model's own backward pass leaves each process the statistics of its own images."""
    model = DistributedDataParallel(_model().train())
    _plain(model, _bags()[2 * rank : 2 * rank + 2], LABELS[:2])
    average_statistics(model)
    found = select(model, [bag_of(23)], 4, 5)
    assert torch.equal(select(model, [bag_of(23)], 4, 5, group=dist.group.WORLD).scores, found.scores)


def _check_collectives(rank: int) -> None:
    """What they write is selected with, though nothing counts it: else `group` would mix two models in one answer."""
    torch.manual_seed(rank)
    encoder = ResNet("resnet18", 2)
    model = IPSModel(encoder, Aggregator(encoder.dim, 1), {"er": linear_head("binary", encoder.dim, 2)})
    bags = [bag_of(23)]
    select(model, bags, 4, 5)
    for x in model.state_dict().values():
        dist.broadcast(x, 0)
    found, fresh = select(model, bags, 4, 5), select(model, bags, 4, 5, scorer=Scorer(model))
    assert torch.equal(found.scores, fresh.scores)
    assert torch.equal(select(model, bags, 4, 5, group=dist.group.WORLD).scores, fresh.scores)


@pytest.mark.slow
def test_two_processes_make_the_gradient_of_one(tmp_path: Path) -> None:
    spawn(_worker, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    expected = {name: _model() for name in STEPS}
    for name, model in expected.items():
        (_with_context if name.startswith("context") else _plain)(model, _bags(), LABELS)
    for name, model in expected.items():
        ours, theirs = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        for parameter, wanted in model.named_parameters():
            torch.testing.assert_close(ours[parameter], wanted.grad, msg=f"{name} {parameter}")
            assert torch.equal(ours[parameter], theirs[parameter])
    first, second = (torch.load(tmp_path / f"statistics-{rank}.pt") for rank in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    assert not torch.equal(first["bn.running_mean"], _model().encoder.get_buffer("bn.running_mean"))


def test_one_process_keeps_what_it_has(group_of_one: dist.ProcessGroup) -> None:
    model = _model()
    _plain(model, _bags(), LABELS)
    model.heads.zero_grad()
    before = copy.deepcopy([p.grad for p in model.parameters()])
    statistics = copy.deepcopy(list(model.buffers()))
    average_gradients(model, group_of_one)
    average_statistics(model, group_of_one)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros_like(parameter) if gradient is None else gradient)
    assert all(torch.equal(x, y) for x, y in zip(model.buffers(), statistics, strict=True))
