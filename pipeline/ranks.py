"""What the ranks of one training exchange: a sum. DDP's hooks do not fit a step in which a rank may have no slide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def _alone(_tensor: Tensor) -> None:
    """The sum over one rank."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands, and the sum over all of them (in place)."""

    rank: int = 0
    world_size: int = 1
    sum_: Callable[[Tensor], None] = _alone


def sum_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Sum every gradient over the ranks, in one flat buffer; a rank without slides adds zeros."""
    if ranks.world_size == 1:
        return
    gradients = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    ranks.sum_(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def average_statistics(model: nn.Module, ranks: Ranks, weight: float) -> None:
    """Average batch-norm running statistics over the ranks that took slides, so all ranks score alike."""
    if ranks.world_size == 1:
        return
    count = torch.tensor([weight], device=next(model.parameters()).device)
    ranks.sum_(count)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.mul_(weight)
            ranks.sum_(buffer)
            buffer.div_(count)
