"""Whether a model has changed since it was last looked at, without reading a weight: no device is waited for.

Autograd counts what is written in place, and hooks see the steps of every optimiser, since fused ones write past that
count. What is written through `parameter.data`, or by a collective, is seen by nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)


@dataclass(frozen=True)
class Look:
    """What modules were made of, and how often it had been written to."""

    structure: tuple[object, ...]
    """Which modules, hooks and tensors, where and of what precision: a copy is made for these."""
    content: tuple[object, ...]
    _alive: tuple[object, ...] = field(compare=False)
    """So that no id is given away again."""


def look(parts: Iterable[nn.Module]) -> Look:
    """At modules as they are now."""
    structure: list[object] = []
    content: list[object] = [_steps]
    alive: list[object] = []
    for module in (module for part in parts for module in part.modules()):
        hooks = (*module._forward_pre_hooks, *module._forward_hooks)
        structure += [id(module), hooks]
        alive.append(module)
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None:
                structure += [id(tensor), tensor.device, tensor.dtype]
                content.append(_written(tensor))
                alive.append(tensor)
    return Look(tuple(structure), tuple(content), tuple(alive))


def _written(tensor: Tensor) -> object:
    """Nothing is counted for a tensor made in inference mode: it never equals itself."""
    return object() if tensor.is_inference() else (tensor.data_ptr(), tensor._version)
