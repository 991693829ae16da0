"""What int8 products give a ResNet-18 on this CPU: `python -m tests.bench.int8`, a minute.

The convolutions of the trunk at 224 px, one after another with the sizes and strides that they have there: in float32,
in bfloat16, and by torch's quantised kernels (oneDNN; unsigned activations, a scale for each channel of the weights;
zero, since a sum that is shorter for want of it shows the same). What stands between them is left out: the figure for
int8 is what a first pass could reach at best, before norms, residuals, the change of number and a second pass over what
is doubtful. Ratios are to float32 in the same run; `select` of this package is not called.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.bench.lesions import stamp
from tests.bench.scenes import Clock

PATCHES = 16


@dataclass(frozen=True)
class Conv:
    """One shape of the trunk, and how often it comes."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int
    times: int

    @property
    def products(self) -> float:
        """Multiply-adds a patch, of all of them."""
        return self.times * self.inputs * self.outputs * (self.kernel * self.size / self.stride) ** 2


TRUNK = (
    Conv(3, 64, 7, 2, 224, 1),
    Conv(64, 64, 3, 1, 56, 4),
    Conv(64, 128, 3, 2, 56, 1), Conv(64, 128, 1, 2, 56, 1), Conv(128, 128, 3, 1, 28, 3),
    Conv(128, 256, 3, 2, 28, 1), Conv(128, 256, 1, 2, 28, 1), Conv(256, 256, 3, 1, 14, 3),
    Conv(256, 512, 3, 2, 14, 1), Conv(256, 512, 1, 2, 14, 1), Conv(512, 512, 3, 1, 7, 3),
)  # fmt: skip


def quantised(conv: Conv, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """The kernel with its weights packed, of float operands."""
    activations = torch.quantize_per_tensor(x.abs(), 0.02, 0, torch.quint8).contiguous(
        memory_format=torch.channels_last
    )
    scales, zeros = weight.abs().amax(dim=(1, 2, 3)).double() / 127, torch.zeros(conv.outputs, dtype=torch.int64)
    channels = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    pad = [conv.kernel // 2] * 2
    packed = torch.ops.quantized.conv2d_prepack(channels, None, [conv.stride] * 2, pad, [1, 1], 1)
    return lambda: torch.ops.quantized.conv2d_relu(activations, packed, 0.1, 0)


def runs(conv: Conv) -> dict[str, Callable[[], object]]:
    """The same convolution, in each way."""
    x = torch.randn(PATCHES, conv.inputs, conv.size, conv.size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(conv.outputs, conv.inputs, conv.kernel, conv.kernel) * 0.05

    def plain(dtype: torch.dtype) -> Callable[[], Tensor]:
        a, w = x.to(dtype), weight.to(dtype).contiguous(memory_format=torch.channels_last)
        return lambda: torch.nn.functional.conv2d(a, w, None, conv.stride, conv.kernel // 2).relu_()

    return {"float32": plain(torch.float32), "bfloat16": plain(torch.bfloat16), "int8": quantised(conv, x, weight)}


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    Clock.add_option(parser)
    options = parser.parse_args()
    clock = Clock.from_options(options)
    print(f"engine {torch.backends.quantized.engine}, kernels for {torch.backends.cpu.get_cpu_capability()}")
    print("| convolution | times | float32, GMAC/s | bfloat16 | int8 |\n|---|---|---|---|---|")
    total = {"float32": 0.0, "bfloat16": 0.0, "int8": 0.0}
    for conv in TRUNK:
        best = clock.race(runs(conv), options.rounds)
        for name, seconds in best.items():
            total[name] += conv.times * seconds
        rate = PATCHES * conv.products / conv.times / best["float32"] / 1e9
        shape = f"{conv.inputs} to {conv.outputs}, {conv.kernel} x {conv.kernel} / {conv.stride}, {conv.size} px"
        cells = [f"{best['float32'] / best[name]:.2f}x" for name in ("bfloat16", "int8")]
        print(f"| {shape} | {conv.times} | {rate:.0f} | {' | '.join(cells)} |", flush=True)
    ratios = {name: total["float32"] / seconds for name, seconds in total.items()}
    print(f"all convolutions of a patch, of float32: bfloat16 {ratios['bfloat16']:.2f}x, int8 {ratios['int8']:.2f}x")
    print(json.dumps({**stamp(), "ms_a_patch": {k: 1e3 * v / PATCHES for k, v in total.items()}, "ratios": ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
