"""What a training needs of memory: running out says which setting to lower, and is tried before step one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from pipeline.config.model import SelectConfig, TrainConfig
from pipeline.errors import StageError

Part = Literal["selection", "gradient pass", "validation"]
_HOST = "DefaultCPUAllocator"  # torch's own word where the host has no memory left; it has no class of its own


@contextmanager
def memory_advice(train: TrainConfig, selecting: SelectConfig, part: Part) -> Iterator[None]:
    """Turn running out of memory inside into a StageError that names the settings to lower, with their values.

    Args:
        train: what the step does.
        selecting: what the selection does.
        part: what runs inside.
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
        reason = str(error).partition("\n")[0]
        raise StageError(
            f"train: out of memory in the {part} ({reason}); lower {_settings(train, selecting, part)}"
        ) from error


def _settings(train: TrainConfig, selecting: SelectConfig, part: Part) -> str:
    if part != "gradient pass":
        chunk = f"model.select.chunk={selecting.chunk}"
        if selecting.mode in ("random", "every"):
            return chunk
        batch = "null, which is 256 on a GPU and 32 on a CPU" if train.score_batch is None else str(train.score_batch)
        return f"train.score_batch ({batch}); above that number, {chunk} too"
    slides = f"train.batch_size={train.batch_size}"
    memory = f"model.select.memory={selecting.memory}"
    if train.bounded:
        return f"train.grad_chunk={train.grad_chunk}; if that does not do, {memory}"
    if train.micro_batch is None:
        slides += ", set train.micro_batch"
    else:
        slides = f"train.micro_batch={train.micro_batch}"
    return f"{memory} or {slides}, or set train.bounded=true with train.norm=group (or frozen, for pretrained weights)"


def host_advice(train: TrainConfig, selecting: SelectConfig) -> str:
    """What to lower where a worker's process was ended for want of memory, with the values."""
    batch = f"train.batch_size={train.batch_size}"
    if train.micro_batch is not None:
        batch = f"train.micro_batch={train.micro_batch}"
    return (
        f"where memory is short, lower model.select.chunk={selecting.chunk}, model.select.memory={selecting.memory} or "
        f"{batch}, or put fewer of cluster.workers on a node"
    )


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


def forget_peak() -> None:
    """From here on `peak_bytes` counts anew: Ray's processes do one task after another."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # of the resident set (proc(5))


def peak_bytes() -> float:
    """Most that was held since `forget_peak`: of the device, or the resident set where it computes on a CPU."""
    return float(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak_resident_bytes()


def peak_resident_bytes() -> float:
    """Of this process, by Linux; `getrusage` would count what the process was before it ran this program."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024.0 * float(line.split()[1])
