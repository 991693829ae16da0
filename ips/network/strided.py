"""Convolutions that are right in bfloat16 on a CPU where a single column of outputs is left.

There oneDNN (of torch 2.13, a CPU with AMX) reads memory that is not its own: forward where the column has several
rows, backward to the weights; any kernel wider than one, any stride above one, grouped or not, in both memory layouts.
Such maps are those of the last stages of narrow patches: of a ResNet, up to 32 px.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_Size = int | Sequence[int]


def widened(
    input: Tensor,  # noqa: A002, as `torch.conv2d` calls it
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size | str = 0,
    dilation: _Size = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.conv2d` that adds columns of zeros, as the padding has them, and cuts off what they give."""

    def convolved(x: Tensor) -> Tensor:
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)

    step = _across(stride)
    beside = 0 if isinstance(padding, str) else _across(padding)  # a strided one may only say "valid"
    # columns that the map lacks for a second column of outputs
    short = step + _across(dilation) * (weight.shape[-1] - 1) + 1 - 2 * beside - input.shape[-1]
    if input.device.type != "cpu" or step < 2 or not 0 < short <= step:  # more: too narrow for any output, an error
        return convolved(input)
    return convolved(nn.functional.pad(input, (0, short)))[..., :1]


def _across(size: _Size) -> int:
    return size if isinstance(size, int) else size[-1]


class Strided(nn.Conv2d):
    """A convolution of stride > 1 that is `widened`."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h', w') as `nn.Conv2d`."""
        return widened(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class _Widening(TorchFunctionMode):
    """`widened` for every `torch.conv2d`, whoever calls it."""

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (widened if func is torch.conv2d else func)(*args, **(kwargs or {}))


def guarded(x: Tensor) -> AbstractContextManager[object]:
    """What a network that is not ours runs on x in: its convolutions are right, and it stays as it is."""
    if x.device.type == "cpu" and (x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")):
        return _Widening()
    return nullcontext()
