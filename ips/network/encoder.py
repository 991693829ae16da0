"""Patch encoders: (n, C, h, w) pixels or (n, F) features -> (n, D) embeddings.

The ResNets carry torchvision's state-dict names, so its weights load; torchvision itself is not needed.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ips.network.part import PatchEncoder
from ips.network.strided import Strided, guarded
from ips.network.tensors import read_tensors

_BLOCKS: Mapping[str, tuple[int, int, int, int]] = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
}
_NOT_OURS = ("fc.", "layer1.", "layer2.", "layer3.", "layer4.")  # torchvision's classifier and the stages cut off


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, width, h / stride, w / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + self.downsample(x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the stride stands on the 3x3 as in torchvision (ResNet v1.5)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, 4 width, h / stride, w / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + self.downsample(x))
        return out


def _conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return (Strided if stride == 2 else nn.Conv2d)(inputs, outputs, 3, stride, 1, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(PatchEncoder):
    """A ResNet trunk with global average pooling; `dim` is the width of its embeddings.

    Args:
        name: resnet18, resnet34 or resnet50.
        stages: residual stages kept, 2 or 4; 2 is the paper's Megapixel-MNIST trunk (D = 128 for resnet18).
        channels: 1 or 3.

    Raises:
        ValueError: another name, number of stages or channels.
    """

    def __init__(self, name: str, stages: Literal[2, 4] = 4, channels: Literal[1, 3] = 3) -> None:
        super().__init__()
        if name not in _BLOCKS:
            raise ValueError(f"name={name!r} is not a known encoder; use one of {sorted(_BLOCKS)}")
        if stages not in (2, 4) or channels not in (1, 3):
            raise ValueError(f"stages={stages}, channels={channels}; stages must be 2 or 4 and channels 1 or 3")
        block: type[BasicBlock | Bottleneck] = Bottleneck if name == "resnet50" else BasicBlock
        self.channels = channels
        self.stem_bytes: int | None = None
        """Limit to the first feature maps, which are the largest; None runs the batch at once, as batch norms that
        train need it."""
        self.conv1 = Strided(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = 64
        self.stages: list[str] = []
        for stage, depth in enumerate(_BLOCKS[name][:stages]):
            width = 64 * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (depth - 1)
            layers = []
            for stride in strides:
                layers.append(block(inputs, width, stride))
                inputs = width * block.expansion
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*layers))
        self.dim = inputs
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, h, w) float -> (n, D)."""
        parts = [self._stem(part) for part in torch.split(x, self._stem_rows(x))]
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return x.mean(dim=(2, 3))

    def _stem(self, x: Tensor) -> Tensor:
        # pooled before the ReLU, not after as in the paper: the same values and gradients, a quarter of the ReLUs
        y: Tensor = self.relu(self.maxpool(self.bn1(self.conv1(x))))
        return y

    def _stem_rows(self, x: Tensor) -> int:
        """Patches of x (n, C, h, w) that go through the stem at once: equal parts, so that no row is a case apart."""
        if self.stem_bytes is None:
            return len(x)
        n, area = len(x), -(-x.shape[2] // 2) * -(-x.shape[3] // 2)
        fit = max(1, self.stem_bytes // (self.conv1.out_channels * area * x.element_size()))
        return n if fit >= n else min(1 << (fit.bit_length() - 1), n & -n)  # powers of 2; the latter divides n

    def conv_norm_pairs(self) -> Iterator[tuple[str, str]]:
        """Names of each convolution and the batch norm that directly follows it, for fusing."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                path, _, leaf = name.rpartition(".")
                norm = "1" if leaf == "0" else leaf.replace("conv", "bn")
                yield name, f"{path}.{norm}".lstrip(".")


def _initialise(module: nn.Module) -> None:
    """He initialisation by fan-out, as torchvision does it."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class FeatureProjector(PatchEncoder):
    """Encoder for precomputed features (the paper's CAMELYON16 setting): layer norm, linear, batch norm, ReLU."""

    inputs: int

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.inputs, self.dim = inputs, dim
        self.norm = nn.LayerNorm(inputs, elementwise_affine=False)
        self.linear = nn.Linear(inputs, dim)
        self.bn = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(n, F) -> (n, D)."""
        short = -x.shape[1] % 16  # products of such width treat all rows alike, see `ips.selection.scorer`
        x, weight = (nn.functional.pad(part, (0, short)) for part in (self.norm(x), self.linear.weight))
        return torch.relu(self.bn(nn.functional.linear(x, weight, self.linear.bias)))


class WrappedEncoder(PatchEncoder):
    """Any network of (n, C, h, w) -> (n, D) as an encoder, checked when it is used.

    Args:
        network: in training it may use batch norm and dropout; the selection runs it in evaluation mode. It may be
            used without a model, to make features.
        dim: D.
        channels: C; chunks of other patches are refused.
    """

    channels: int

    def __init__(self, network: nn.Module, dim: int, channels: int) -> None:
        super().__init__()
        self.network, self.dim, self.channels = network, dim, channels

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, h, w) -> (n, D); ValueError where the network gives something else."""
        with guarded(x):
            out: Tensor = self.network(x)
        if out.shape != (len(x), self.dim):
            raise ValueError(
                f"network: {type(self.network).__name__} gives shape {tuple(out.shape)} for {tuple(x.shape)}; an "
                f"encoder gives ({len(x)}, {self.dim}), so pool its map and remove its classifier"
            )
        return out


class TwoScales(PatchEncoder):
    """Patches and their surroundings through one encoder, their embeddings side by side (Li et al. 2021, DSMIL).

    A patch (n, C, 2p, p) has its surroundings, as many px of a larger place around the same centre, below itself. The
    selector scores both together: a patch may win by where it is.

    Args:
        encoder: of either, (n, C, p, p) -> (n, D / 2).
    """

    def __init__(self, encoder: PatchEncoder) -> None:
        super().__init__()
        self.encoder, self.dim, self.channels = encoder, 2 * encoder.dim, encoder.channels

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, 2p, p) -> (n, D); ValueError where the patches are of another shape."""
        edge = x.shape[-1]
        if x.shape[-2] != 2 * edge:
            raise ValueError(f"patches are {edge} x {x.shape[-2]} px; with surroundings below they are twice as high")
        found: Tensor = self.encoder(torch.cat([x[..., :edge, :], x[..., edge:, :]]))
        return torch.cat([found[: len(x)], found[len(x) :]], dim=1)


def resnet_in(encoder: nn.Module) -> tuple[str, ResNet] | None:
    """The ResNet that an encoder is, or looks with at two scales, and what its modules' names begin with in it."""
    prefix, inner = ("encoder.", encoder.encoder) if isinstance(encoder, TwoScales) else ("", encoder)
    return (prefix, inner) if isinstance(inner, ResNet) else None


def read_weights(data: bytes) -> dict[str, Tensor]:
    """Read a state dict from the bytes of a .safetensors file or of a .pth file that holds only tensors.

    Raises:
        ValueError: the bytes are neither.
    """
    try:
        if data[8:9] == b"{":  # a safetensors file opens with 8 bytes of header length, then JSON
            return _read_safetensors(data)
        state = read_tensors(io.BytesIO(data))
    except Exception as error:
        raise ValueError(
            f"weights: neither a safetensors file nor a .pth file of tensors only: {error}; save them with "
            "safetensors, or as torch.save(model.state_dict(), FILE)"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(x, Tensor) for n, x in state.items()):
        raise ValueError("weights: the file holds something else than a mapping of names to tensors; save state_dict()")
    return state


_SAFE_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _read_safetensors(data: bytes) -> dict[str, Tensor]:
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    state = {}
    for name, entry in header.items():
        low, high = (start + offset for offset in entry["data_offsets"])
        dtype, shape = _SAFE_DTYPES[entry["dtype"]], entry["shape"]
        if math.prod(shape) == 0:
            state[name] = torch.empty(shape, dtype=dtype)
        else:
            state[name] = torch.frombuffer(bytearray(data[low:high]), dtype=dtype).reshape(shape)
    return state


def load_weights(
    module: nn.Module, source: Path | str | bytes | Mapping[str, Tensor], classifier: Sequence[str] = ()
) -> None:
    """Load a state dict into `module`, all or nothing.

    torchvision's classifier (`fc.`), the stages that `module` does not have, and `classifier` are passed over;
    everything else must fit.

    Args:
        module: usually a `ResNet`.
        source: path or bytes of a .safetensors or .pth file, or the state dict itself.
        classifier: names of layers that `module` was made without.

    Raises:
        ValueError: missing or unexpected names, other shapes, or NaN; all of them are listed.
    """
    if isinstance(source, Path | str):
        source = Path(source).read_bytes()
    given = read_weights(source) if isinstance(source, bytes) else source
    wanted = module.state_dict()
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}  # absent from old files, unused
    own = tuple(f"{name}." for name, _ in module.named_children())
    passed = tuple(f"{name}." for name in classifier)
    extra = [
        name
        for name in given
        if name not in wanted
        and not name.startswith(passed)
        and (not name.startswith(_NOT_OURS) or name.startswith(own))
    ]
    problems = [f"missing {name}" for name in wanted if name not in given and name not in optional]
    problems += [f"unexpected {name}" for name in extra]
    problems += [
        f"{name} has shape {tuple(given[name].shape)}, needs {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    problems += [f"{name} holds NaN" for name in wanted if name in given and given[name].isnan().any()]
    if problems:
        raise ValueError(f"weights: {len(problems)} names do not fit {type(module).__name__}: " + "; ".join(problems))
    module.load_state_dict({name: given[name] for name in wanted if name in given}, strict=False)
