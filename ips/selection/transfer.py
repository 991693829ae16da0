"""Patches from the host to the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ips.bag import Chunk


def arrived(chunk: Chunk, device: torch.device, *, side_stream: bool = True) -> Tensor:
    """The patches of a chunk on `device`, prepared.

    Raises:
        ValueError: `prepare` made patches of another shape or dtype.
    """
    return prepared(to_device(chunk.patches, device, side_stream=side_stream), chunk)


def prepared(patches: Tensor, chunk: Chunk) -> Tensor:
    """What `chunk.prepare` makes of its patches, wherever they are."""
    if chunk.prepare is None:
        return patches
    found = chunk.prepare(patches.clone() if patches is chunk.patches else patches)  # it may write in place
    if found.shape != patches.shape or found.dtype != patches.dtype:
        raise ValueError(
            f"prepare made {tuple(found.shape)} {found.dtype} of patches {tuple(patches.shape)} {patches.dtype}; "
            "it must keep shape and dtype"
        )
    return found


def to_device(patches: Tensor, device: torch.device, *, side_stream: bool = True) -> Tensor:
    """Patches on `device`; to CUDA through pinned memory on a side stream, so that the device's work goes on."""
    if device.type != "cuda" or patches.is_cuda or not side_stream:
        return patches.to(device)
    side = _side_stream(device)
    with torch.cuda.stream(side):
        moved = patches.contiguous().pin_memory().to(device, non_blocking=True)
    torch.cuda.current_stream(device).wait_stream(side)
    moved.record_stream(torch.cuda.current_stream(device))
    return moved


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _side_streams[device]
