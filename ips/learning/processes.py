"""What several processes that train one model exchange after each has made its own gradients.

    torchrun: each process selects in its own bags -> bounded_backward, or loss.backward() -> average_gradients -> step

DistributedDataParallel does the same: `bounded_backward` of a wrapped model ends with these two.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def average_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Replace each gradient by its mean over the processes, which all call this; one without a gradient adds zeros.

    The mean over processes is that over images where all have equally many. Else let each loss be the sum over its own
    images, times processes / images of all.

    Args:
        model: the same on all of them, with the same parameters frozen.
        group: of them; None means all.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad
    for parameter in trained:
        assert parameter.grad is not None
        _average(parameter.grad, group)


@torch.no_grad()
def average_statistics(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Replace the running statistics of batch norms by their means, so that all processes select alike."""
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            _average(buffer, group)


def _average(x: Tensor, group: dist.ProcessGroup | None) -> None:
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    x.copy_(total / dist.get_world_size(group))  # not by the collective, whose writes `ips.selection.changes` misses
