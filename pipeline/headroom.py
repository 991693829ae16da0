"""What a training step needs of memory: running out says which setting to lower, and is tried before step one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipeline.config_model import SelectConfig, TrainConfig
from pipeline.errors import StageError

_HOST = "DefaultCPUAllocator"  # torch's own word where the host has no memory left; it has no class of its own


@contextmanager
def memory_advice(train: TrainConfig, selecting: SelectConfig, *, selection: bool) -> Iterator[None]:
    """Turn running out of memory inside into a StageError that names the settings to lower, with their values.

    Args:
        train: what the step does.
        selecting: what the selection does.
        selection: whether the selection runs inside, or the gradient pass.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if (
            isinstance(error, RuntimeError)
            and not isinstance(error, torch.OutOfMemoryError)
            and _HOST not in str(error)
        ):
            raise
        what = "selection" if selection else "gradient pass"
        reason = str(error).partition("\n")[0]
        raise StageError(
            f"train: out of memory in the {what} ({reason}); lower {_settings(train, selecting, selection=selection)}"
        ) from error


def _settings(train: TrainConfig, selecting: SelectConfig, *, selection: bool) -> str:
    if selection:
        return f"model.select.chunk={selecting.chunk}"
    slides = f"train.batch_size={train.batch_size}"
    memory = f"model.select.memory={selecting.memory}"
    if train.bounded:
        return f"train.grad_chunk={train.grad_chunk}; if that does not do, {memory}"
    if train.micro_batch is None:
        slides += ", set train.micro_batch"
    else:
        slides = f"train.micro_batch={train.micro_batch}"
    return f"{memory} or {slides}, or set train.bounded=true with train.norm=group (or frozen, for pretrained weights)"


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, a step may be tried: random numbers, running statistics and gradients are as before afterwards."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            model.zero_grad(set_to_none=True)
