from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.ranks import Ranks, average_statistics, sum_gradients


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


def test_statistics_are_averaged_over_the_ranks_that_took_slides() -> None:
    model = nn.BatchNorm1d(1)
    model.running_mean.fill_(4.0)  # type: ignore[union-attr]
    ones = torch.ones(1)
    average_statistics(model, _other_rank_adds([ones, ones * 2.0, ones * 3.0]), weight=1.0)
    assert float(model.running_mean) == 3.0  # type: ignore[arg-type]
    idle = nn.BatchNorm1d(1)
    average_statistics(idle, _other_rank_adds([ones, ones * 2.0, ones * 5.0]), weight=0.0)
    assert float(idle.running_mean) == 2.0  # type: ignore[arg-type]
    assert float(idle.running_var) == 5.0  # type: ignore[arg-type]
