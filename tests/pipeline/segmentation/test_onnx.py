"""A network of ONNX runs as torch runs the same one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d

from tests.pipeline.segmentation.networks import onnx_file, settings

pytest.importorskip("onnxruntime", reason="needs the extra onnx")


def test_it_gives_what_torch_gives(tmp_path: Path) -> None:
    from pipeline.segmentation.onnx import OnnxNetwork

    generator = np.random.default_rng(7)
    weights = generator.integers(-4, 5, (2, 3, 3, 3)).astype(np.float32)
    path = onnx_file(weights, [3, -2], tmp_path / "a.onnx")
    picture = generator.integers(0, 256, (1, 3, 37, 53)).astype(np.float32)
    expected = conv2d(torch.from_numpy(picture), torch.from_numpy(weights), torch.tensor([3.0, -2.0]), padding=1)
    assert (OnnxNetwork(path.read_bytes())(picture) == expected.numpy()).all()  # whole numbers are exact


def test_it_is_a_tissue_network_by_its_content(tmp_path: Path) -> None:
    from pipeline.segmentation.network import open_network, read_network

    path = onnx_file(np.ones((2, 3, 3, 3), np.float32), [0, 1], tmp_path / "network.bin")
    assert read_network(settings(path))[0] == "onnx"
    assert open_network(settings(path))(np.zeros((1, 3, 64, 64), np.float32)).shape == (1, 2, 64, 64)


def test_what_onnx_does_not_take_is_told(tmp_path: Path) -> None:
    from pipeline.errors import ConfigError
    from pipeline.segmentation.network import open_network

    path = onnx_file(np.ones((2, 4, 3, 3), np.float32), [0, 1], tmp_path / "four.onnx")  # of four channels
    with pytest.raises(ConfigError, match=r"tiling.tissue_model.uri: .*four.onnx cannot be run on 64 x 64 px"):
        open_network(settings(path))
    (tmp_path / "odd.onnx").write_bytes(b"\x08\x08 this is no graph")
    with pytest.raises(ConfigError, match=r"tiling.tissue_model.uri: .*odd.onnx cannot be run"):
        open_network(settings(tmp_path / "odd.onnx"))
