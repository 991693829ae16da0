from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.ranks import Ranks, average_statistics, gathered, sum_gradients


def _other_rank_adds(values: list[Tensor]) -> Ranks:
    """A second rank that contributes the given tensors, in the order of the sums."""
    queue = iter(values)

    def sum_(tensor: Tensor) -> None:
        tensor.add_(next(queue))

    return Ranks(rank=0, world_size=2, sum_=sum_)


def test_gradients_are_summed_in_place_and_absent_ones_count_as_zero() -> None:
    first, second = nn.Linear(2, 3), nn.Linear(3, 1)
    first(torch.ones(1, 2)).sum().backward()  # the second layer has no gradient yet
    assert first.weight.grad is not None
    before = first.weight.grad.clone()
    other = torch.arange(13, dtype=torch.float32)
    sum_gradients(nn.Sequential(first, second), _other_rank_adds([other]))
    assert torch.equal(first.weight.grad, before + other[:6].view(3, 2))
    assert second.weight.grad is not None
    assert torch.equal(second.weight.grad.flatten(), other[9:12])


def test_frozen_parameters_get_no_gradient() -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    sum_gradients(model, _other_rank_adds([torch.ones(2)]))
    assert model.bias.grad is None
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, torch.ones(1, 2))


@pytest.mark.parametrize(("limit", "buckets"), [(1, [6, 3, 3, 1]), (36, [9, 4]), (35, [6, 7]), (10_000, [13])])
def test_gradients_travel_in_buckets(limit: int, buckets: list[int]) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model(torch.ones(1, 2)).sum().backward()
    wanted = [parameter.grad * 3 for parameter in model.parameters() if parameter.grad is not None]
    sent: list[int] = []

    def three_alike(tensor: Tensor) -> None:
        sent.append(tensor.numel())
        tensor.mul_(3)

    sum_gradients(model, Ranks(0, 3, three_alike), bucket_bytes=limit)
    assert sent == buckets
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted, strict=True) if p.grad is not None)


def test_a_bucket_holds_one_dtype() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double())
    sent: list[torch.dtype] = []
    sum_gradients(model, Ranks(0, 2, lambda tensor: sent.append(tensor.dtype)))
    assert sent == [torch.float32, torch.float64]


def test_statistics_are_averaged_over_the_ranks_that_took_slides() -> None:
    model = nn.BatchNorm1d(1)
    model.running_mean.fill_(4.0)  # type: ignore[union-attr]
    average_statistics(model, _other_rank_adds([torch.tensor([1.0, 2.0, 3.0])]), weight=1.0)
    assert float(model.running_mean) == 3.0  # type: ignore[arg-type]
    idle = nn.BatchNorm1d(1)
    average_statistics(idle, _other_rank_adds([torch.tensor([1.0, 2.0, 5.0])]), weight=0.0)
    assert float(idle.running_mean) == 2.0  # type: ignore[arg-type]
    assert float(idle.running_var) == 5.0  # type: ignore[arg-type]


def test_bytes_of_all_ranks_are_gathered_by_rank() -> None:
    other = b"\xff\x00longer"
    rows = torch.zeros(2, len(other), dtype=torch.uint8)
    rows[1] = torch.tensor(list(other), dtype=torch.uint8)
    ranks = _other_rank_adds([torch.tensor([0, len(other)]), rows])
    assert gathered(b"mine", ranks, torch.device("cpu")) == [b"mine", other]
    assert gathered(b"\x00", Ranks(), torch.device("cpu")) == [b"\x00"]
