"""What the ranks of one training exchange: sums. DDP's hooks do not fit a step in which a rank may have no slide.

Bytes travel as sums too, in which the others have zeros: every backend has those, on the device that each rank has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20
"""Of gradients summed at a time: large enough to fill a network, small beside a model (DDP's default)."""


def _alone(_tensor: Tensor) -> None:
    """The sum over one rank."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands, and the sum over all of them (in place)."""

    rank: int = 0
    world_size: int = 1
    sum_: Callable[[Tensor], None] = _alone
    group: dist.ProcessGroup | None = None
    """The processes, where they can select together."""


def joined_ranks() -> Ranks:
    """The processes of the default group of torch.distributed; one alone where none is set up."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), _all_reduce, dist.group.WORLD)


def sum_gradients(model: nn.Module, ranks: Ranks, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Sum every gradient over the ranks, bucket by bucket; a rank without slides adds zeros."""
    if ranks.world_size == 1:
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for bucket in _buckets([parameter.grad for parameter in trained if parameter.grad is not None], bucket_bytes):
        _sum(bucket, ranks)


def average_statistics(model: nn.Module, ranks: Ranks, weight: float) -> None:
    """Average batch-norm running statistics over the ranks that took slides, so all ranks score alike.

    Args:
        model: with the statistics of this rank.
        ranks: all of them.
        weight: 1 where this rank took slides in the step, else 0.
    """
    statistics = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if ranks.world_size == 1 or not statistics:
        return
    count = statistics[0].new_tensor([weight])
    for buffer in statistics:
        buffer.mul_(weight)
    _sum([count, *statistics], ranks)
    for buffer in statistics:
        buffer.div_(count)


def gathered(mine: bytes, ranks: Ranks, device: torch.device) -> list[bytes]:
    """What every rank has, by rank; all of them call this together.

    Args:
        mine: of this rank, not empty.
        ranks: all of them.
        device: of this rank, where its sums are made.
    """
    lengths = torch.zeros(ranks.world_size, dtype=torch.int64, device=device)
    lengths[ranks.rank] = len(mine)
    ranks.sum_(lengths)
    every = [int(length) for length in lengths]
    rows = torch.zeros(ranks.world_size, max(every), dtype=torch.uint8, device=device)
    rows[ranks.rank, : len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
    ranks.sum_(rows)
    return [bytes(row[:length].cpu().numpy()) for row, length in zip(rows, every, strict=True)]


def agreed(ranks: Ranks, device: torch.device, *, answer: bool) -> bool:
    """Rank 0's answer, on every rank; all of them call this together."""
    if ranks.world_size == 1:
        return answer
    flag = torch.tensor([float(answer and ranks.rank == 0)], device=device)
    ranks.sum_(flag)
    return bool(flag.item())


def _all_reduce(tensor: Tensor) -> None:
    dist.all_reduce(tensor)


def _buckets(tensors: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, up to `limit` bytes together; a larger one stands alone."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and (held + tensor.nbytes > limit or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.nbytes
    if bucket:
        yield bucket


def _sum(tensors: list[Tensor], ranks: Ranks) -> None:
    """Sum the tensors over the ranks through one flat buffer, in place."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    ranks.sum_(flat)
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
