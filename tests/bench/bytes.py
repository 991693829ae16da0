"""A ResNet of basic blocks in int8, from the first pixel to the last feature map: what `tests.bench.int8` times.

Activations are unsigned bytes with one scale a map, from the ranges that calibration patches have in float32; weights
are signed ones with a scale for each output channel, batch norms fused. A residual is added within the convolution, so
no map is ever written in another number. It runs on the operators that torch's own compiler lowers int8 graphs to
(`torch.ops.onednn`), which are no public interface of it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ips.network.encoder import BasicBlock, ResNet
from ips.selection.fusing import fusable, fuse, strip_norms


@dataclass(frozen=True)
class Scale:
    """A byte b stands for size * (b - zero)."""

    size: float
    zero: int = 0

    @classmethod
    def of(cls, low: float, high: float) -> Scale:
        """That holds 0 and what lies between."""
        low, high = min(0.0, low), max(high, 1e-6)
        size = (high - low) / 255
        return cls(size, round(-low / size))


class ByteConv:
    """One convolution, packed for bytes of a scale to bytes of another."""

    def __init__(self, conv: nn.Conv2d, before: Scale, after: Scale, *, relu: bool = True) -> None:
        assert conv.bias is not None
        weight = conv.weight.detach().float()
        sizes = (weight.abs().amax(dim=(1, 2, 3)) / 127).clamp(min=1e-12)
        signed = (weight / sizes.view(-1, 1, 1, 1)).round().to(torch.int8)
        self.after, places = after, ([*conv.stride], [*conv.padding], [1, 1], 1)
        packed = torch.ops.onednn.qconv_prepack(signed, sizes, before.size, before.zero, *places, None)
        zeros = torch.zeros(len(sizes), dtype=torch.int32)
        self.operands = (before.size, before.zero, packed, sizes, zeros)
        self.end: tuple[Any, ...] = (*places, after.size, after.zero, torch.uint8)
        self.bias, self.relu = conv.bias.detach().float(), "relu" if relu else "none"

    def __call__(self, x: Tensor) -> Tensor:
        """Bytes (n, C, h, w), channels-last -> bytes."""
        operator = torch.ops.onednn.qconv2d_pointwise
        y: Tensor = operator(x, *self.operands, self.bias, *self.end, self.relu, [], "")
        return y

    def onto(self, x: Tensor, shortcut: Tensor, scale: Scale) -> Tensor:
        """The same with a `shortcut` of a `scale` added before the ReLU; its memory is the result's."""
        operator, sums = torch.ops.onednn.qconv2d_pointwise.binary, (scale.size, scale.zero, "sum", 1.0)
        y: Tensor = operator(x, *self.operands, shortcut, self.bias, *self.end, *sums, self.relu, [], "")
        return y


class ByteResNet(nn.Module):
    """A copy in int8 of a ResNet in evaluation mode.

    Args:
        encoder: resnet18 or resnet34.
        patches: (n, C, h, w) normalised, to calibrate with.
    """

    def __init__(self, encoder: ResNet, patches: Tensor) -> None:
        super().__init__()
        self.dim, plain = encoder.dim, fused(encoder)
        ranges = _ranges(plain, patches)
        scales = {name: Scale.of(0.0, high) for name, (_, high) in ranges.items()}  # after a ReLU
        self.pixels = Scale.of(float(patches.min()), float(patches.max()))
        self.stem, x = ByteConv(plain.conv1, self.pixels, scales["conv1"]), scales["conv1"]
        self.blocks = []
        for stage in plain.stages:
            for name, block in plain.get_submodule(stage).named_children():
                assert isinstance(block, BasicBlock)
                inner, after = scales[f"{stage}.{name}.conv1"], scales[f"{stage}.{name}"]
                convs, short = (ByteConv(block.conv1, x, inner), ByteConv(block.conv2, inner, after)), None
                if len(block.downsample):
                    between = Scale.of(*ranges[f"{stage}.{name}.downsample.0"])
                    conv = block.downsample[0]
                    assert isinstance(conv, nn.Conv2d)
                    short = ByteConv(conv, x, between, relu=False)
                self.blocks.append((*convs, short, x if short is None else short.after))
                x = after
        self.last = x

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, h, w) float, normalised -> (n, D)."""
        pixels = (x / self.pixels.size).add_(self.pixels.zero).round_().clamp_(0, 255).to(torch.uint8)
        y = pooled(self.stem(pixels.contiguous(memory_format=torch.channels_last)))
        for first, second, short, scale in self.blocks:
            inner = first(y)
            y = second.onto(inner, y if short is None else short(y), scale)
        return y.float().mean(dim=(2, 3)) * self.last.size


def pooled(y: Tensor) -> Tensor:
    """Maximum over 3 x 3 px with stride 2 and a padding of 1, of bytes of even height and width."""
    for axis in (3, 2):
        even, odd = (y.narrow(axis, start, y.shape[axis] - start).unfold(axis, 1, 2).squeeze(-1) for start in (0, 1))
        best, count = torch.maximum(even, odd), odd.shape[axis] - 1
        torch.maximum(best.narrow(axis, 1, count), odd.narrow(axis, 0, count), out=best.narrow(axis, 1, count))
        y = best
    return y


@torch.no_grad()
def fused(encoder: ResNet) -> ResNet:
    """A copy whose convolutions hold their batch norms."""
    plain = copy.deepcopy(encoder).eval()
    pairs = fusable(plain)
    strip_norms(plain, pairs)
    for conv, norm in pairs:
        fuse(encoder.get_submodule(conv), encoder.get_submodule(norm), plain.get_submodule(conv))
    return plain


@torch.no_grad()
def _ranges(plain: ResNet, patches: Tensor) -> dict[str, tuple[float, float]]:
    """What each module gives, lowest and highest."""
    found: dict[str, tuple[float, float]] = {}

    def note(name: str, output: Tensor) -> None:
        low, high = output.aminmax()
        found[name] = (float(low), float(high))

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: note(name, output))
        for name, module in plain.named_modules()
        if name
    ]
    plain(patches)
    for hook in hooks:
        hook.remove()
    return found
