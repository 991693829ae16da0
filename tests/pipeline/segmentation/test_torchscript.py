"""A network of torch runs as it was written, the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.segmentation.torchscript import ScriptedNetwork
from tests.pipeline.segmentation.networks import Several, scripted


def test_it_gives_the_same_bits_every_time(tmp_path: Path) -> None:
    """Torch optimises a script after its first calls; what it finds must not follow from how often it was called."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1), nn.Tanh()]
    module = nn.Sequential(*layers).eval()
    network = ScriptedNetwork(scripted(module, tmp_path / "a.pt").read_bytes())
    picture = np.random.default_rng(3).normal(size=(1, 3, 61, 83)).astype(np.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        found = [network(picture) for _ in range(4)]
        assert torch.get_num_threads() == threads + 1  # others of the process keep theirs
    finally:
        torch.set_num_threads(threads)
    assert all((one == found[0]).all() for one in found)
    with torch.inference_mode():
        expected = module(torch.from_numpy(picture)).numpy()
    assert found[0].dtype == np.float32
    assert np.allclose(found[0], expected, atol=1e-6)


def test_batch_normalisation_does_not_learn_from_slides(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    network = ScriptedNetwork(scripted(module, tmp_path / "a.pt").read_bytes())
    picture = np.full((1, 3, 8, 8), 9, np.float32)
    assert (network(picture) == network(picture)).all()
    assert np.ptp(network(picture), axis=(2, 3)).max() == 0
    assert np.abs(network(picture)).max() > 1e-3


def test_what_gives_no_tensor_says_what_it_gives(tmp_path: Path) -> None:
    network = ScriptedNetwork(scripted(Several(), tmp_path / "a.pt").read_bytes())
    with pytest.raises(TypeError, match="it gives a dict, not one tensor"):
        network(np.ones((1, 3, 8, 8), np.float32))


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    data = scripted(nn.Conv2d(3, 2, 1), tmp_path / "a.pt").read_bytes()
    with pytest.raises(RuntimeError):
        ScriptedNetwork(data[: len(data) // 2])
