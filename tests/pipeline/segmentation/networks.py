"""Tiny tissue networks as files: their weights are whole numbers, so that what they give is exact in any tile."""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, max_pool2d

from pipeline.config.tissue import TissueModelConfig

REACH = 8
"""Px beyond which `Toy` sees nothing, and a multiple of the 4 px that it makes one of: 1 + 2 + 4, less 1."""


class Toy(nn.Module):
    """Glass and tissue by how much redder than green the surroundings are: two poolings, three convolutions."""

    def __init__(self, limit: float = 20.0) -> None:
        super().__init__()
        self.ones = nn.Buffer(torch.ones(1, 1, 3, 3))
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, h, w) of pixels of 0..1."""
        level = torch.round(255 * x)
        found = conv2d(level[:, :1] - level[:, 1:2], self.ones, padding=1)
        found = conv2d(max_pool2d(found, 2), self.ones, padding=1)
        found = conv2d(max_pool2d(found, 2), self.ones, padding=1)
        found = interpolate(found, scale_factor=4.0, mode="nearest")
        return torch.cat([torch.full_like(found, 729 * self.limit), found], dim=1)


class Small(nn.Module):
    """Half the size, as a network is whose output nobody scaled up."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, h / 2, w / 2)."""
        return max_pool2d(x[:, :2], 2)


class Several(nn.Module):
    """A dictionary, as some networks give."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Of the input."""
        return {"out": x[:, :2]}


class Undefined(nn.Module):
    """No number where the picture is dark."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, h, w)."""
        return torch.log(x[:, :2] - 0.6)


def scripted(module: nn.Module, path: Path) -> Path:
    """Written as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and what tissue networks are given as
        torch.jit.trace(module.eval(), torch.ones(1, 3, 64, 64), strict=False).save(str(path))  # type: ignore[no-untyped-call]
    return path


def settings(path: Path, **fields: Any) -> TissueModelConfig:
    """Of a network for pixels of 0..1 at 2 microns."""
    given = {
        "uri": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "mpp": 2.0,
        "classes": ["glass", "tissue"],
        "tissue": ["tissue"],
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
        "tile": 64,
        "overlap": REACH,
    }
    return TissueModelConfig.model_validate({**given, **fields})


def small_tiling(path: Path) -> dict[str, Any]:
    """For `small_config`, of slides at 0.5 microns whose tissue the network finds."""
    plain = {"patch_px": 32, "mpp": 0.5, "min_tissue": 0.5, "edge": "drop"}
    return {**plain, "tissue": "model", "tissue_model": settings(path).model_dump()}


def onnx_file(weights: npt.NDArray[np.float32], bias: Sequence[float], path: Path) -> Path:
    """One convolution (C, 3, 3, 3) as ONNX, byte by byte: `onnx` itself is no dependency."""
    pads = _bytes(1, b"pads") + b"".join(_number(8, 1) for _ in range(4)) + _number(20, 7)
    node = _bytes(1, b"x") + _bytes(1, b"w") + _bytes(1, b"b") + _bytes(2, b"y") + _bytes(4, b"Conv") + _bytes(5, pads)
    tensors = _tensor(b"w", weights) + _tensor(b"b", np.array(bias, np.float32))
    value = _bytes(11, _value(b"x", 3)) + _bytes(12, _value(b"y", len(weights)))
    graph = _bytes(1, node) + _bytes(2, b"toy") + tensors + value
    path.write_bytes(_number(1, 8) + _bytes(8, _number(2, 13)) + _bytes(7, graph))
    return path


def _tensor(name: bytes, values: npt.NDArray[np.float32]) -> bytes:
    sizes = b"".join(_number(1, size) for size in values.shape)
    return _bytes(
        5, sizes + _number(2, 1) + _bytes(8, name) + _bytes(9, struct.pack(f"<{values.size}f", *values.ravel()))
    )


def _value(name: bytes, channels: int) -> bytes:
    sizes = [_number(1, 1), _number(1, channels), _bytes(2, b"h"), _bytes(2, b"w")]
    shape = b"".join(_bytes(1, size) for size in sizes)
    return _bytes(1, name) + _bytes(2, _bytes(1, _number(1, 1) + _bytes(2, shape)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])
