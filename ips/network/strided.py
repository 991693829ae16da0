"""Convolutions that are right in bfloat16 on a CPU where a single column of outputs is left.

There oneDNN (of torch 2.13, a CPU with AMX) reads memory that is not its own: forward where the column has several
rows, backward to the weights; any kernel wider than one, any stride above one, grouped or not, in both memory layouts.
Such maps are those of the last stages of narrow patches: of a ResNet, up to 32 px.
"""

from __future__ import annotations

from torch import Tensor, nn


class Strided(nn.Conv2d):
    """A convolution of stride > 1: it adds columns of zeros, as the padding has them, and cuts off what they give."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h', w') as `nn.Conv2d`."""
        short = self._short(x.shape[-1])
        if x.device.type != "cpu" or not 0 < short <= self.stride[1]:  # more: too narrow for any output, an error
            return super().forward(x)
        return super().forward(nn.functional.pad(x, (0, short)))[..., :1]

    def _short(self, width: int) -> int:
        """Columns that a map lacks for a second column of outputs."""
        padding = 0 if isinstance(self.padding, str) else self.padding[1]  # a strided one may only say "valid"
        return self.stride[1] + self.dilation[1] * (self.kernel_size[1] - 1) + 1 - 2 * padding - width


def guard(network: nn.Module) -> None:
    """Make plain convolutions of stride > 1 in `network` `Strided`, in place: parameters, names and hooks stay."""
    for module in network.modules():
        if type(module) is nn.Conv2d and module.stride[1] > 1 and module.padding_mode == "zeros":
            module.__class__ = Strided
