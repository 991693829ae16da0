"""Whether a copy still stands for the modules that it was made of. Weights are not compared: they are copied anew.

Nothing counts every write: those through `parameter.data`, by collectives and fused optimisers pass autograd's count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

from torch import nn

_PLAIN = (int, float, str, type(None))


@dataclass(frozen=True)
class Structure:
    """Which modules, hooks and tensors, where and of what precision, and the modules' settings."""

    _parts: tuple[object, ...]
    _alive: tuple[object, ...] = field(compare=False)
    """So that no id is given away again."""


def structure(parts: Iterable[nn.Module], *, settings: bool) -> Structure:
    """Of modules as they are now; `settings` such as strides and epsilons count where a copy has its own."""
    found: list[object] = []
    alive: list[object] = []
    for module in (module for part in parts for module in part.modules()):
        hooks = (*module._forward_pre_hooks, *module._forward_hooks)
        forward = vars(module).get("forward")  # of this one alone, as some tools put it there
        found += [id(module), id(forward), hooks, _settings(module) if settings else None]
        alive += [module, forward]
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None:
                shape = tensor.shape if settings else None  # a lazy one has none
                found += [id(tensor), tensor.device, tensor.dtype, shape]
                alive.append(tensor)
    return Structure(tuple(found), tuple(alive))


def _settings(module: nn.Module) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if name != "training" and _is_plain(value)}


def _is_plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))
