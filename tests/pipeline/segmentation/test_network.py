"""Files that are tissue networks, and those that are none: each is told before anything of it runs."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from pipeline.errors import ConfigError, StorageError
from pipeline.segmentation import network
from pipeline.segmentation.network import is_tissue, open_network, read_network
from tests.pipeline.segmentation.networks import Several, Small, Toy, onnx_file, scripted, settings


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted(Toy(), tmp_path_factory.mktemp("network") / "toy.pt")


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch EVIL",)


def safetensors() -> bytes:
    return bytes(save({"a": torch.ones(3)}))


def saved(value: object) -> bytes:
    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a/readme.txt", "no network")
    return sink.getvalue()


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "pickle": (lambda: pickle.dumps(Evil(), protocol=4), "a pickle, whose loading may run any code"),
    "old pickle": (lambda: pickle.dumps(Evil(), protocol=0), "neither TorchScript nor ONNX; export it as TorchScript"),
    "weights": (lambda: saved(Toy().state_dict()), "weights or objects as torch.save writes them, without the network"),
    "objects": (lambda: saved(Evil()), "weights or objects as torch.save writes them, without the network"),
    "safetensors": (safetensors, "safetensors hold weights without the network"),
    "zip": (zipped, "a ZIP archive that holds no TorchScript"),
    "short": (lambda: zipped()[:40], "the file is cut short or damaged"),
    "text": (lambda: b"not a network", "neither TorchScript nor ONNX"),
    "empty": (lambda: b"", "neither TorchScript nor ONNX"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_network_is_refused_and_not_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made, words = REFUSED[kind]
    data: bytes = made()
    (tmp_path / "network.pt").write_bytes(data)
    given = settings(tmp_path / "network.pt")
    for look in (read_network, open_network):
        with pytest.raises(ConfigError, match=rf"tiling\.tissue_model\.uri: .*network\.pt: {re.escape(words)}"):
            look(given)
    assert not (tmp_path / "EVIL").exists()


def test_the_file_is_the_one_that_was_named(toy: Path, tmp_path: Path) -> None:
    given = settings(toy)
    assert read_network(given) == ("torchscript", toy.read_bytes())
    other = scripted(Toy(21.0), tmp_path / "toy.pt")
    changed = given.model_copy(update={"uri": str(other)})
    with pytest.raises(ConfigError, match=r"tiling.tissue_model.sha256: .* has [0-9a-f]{64}: it is another file"):
        read_network(changed)
    with pytest.raises(StorageError, match="gone.pt"):
        read_network(given.model_copy(update={"uri": str(tmp_path / "gone.pt")}))


def test_networks_of_another_shape_are_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="classes: .* has 2 output channels and 3 classes are named; name each"):
        open_network(settings(toy, classes=["glass", "tissue", "pen"]))
    small = settings(scripted(Small(), tmp_path / "small.pt"))
    with pytest.raises(ConfigError, match=r"makes \[1, 2, 32, 32\] of \[1, 3, 64, 64\]; .* scale its output up"):
        open_network(small)
    several = settings(scripted(Several(), tmp_path / "several.pt"))
    with pytest.raises(ConfigError, match=r"cannot be run on 64 x 64 px: it gives a dict, not one tensor"):
        open_network(several)
    with zipfile.ZipFile(tmp_path / "damaged.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"a/{name}", "nothing")
    with pytest.raises(ConfigError, match=r"tiling.tissue_model.uri: .*damaged.pt cannot be run"):
        open_network(settings(tmp_path / "damaged.pt"))


def test_onnx_without_its_runtime_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = onnx_file(np.ones((2, 3, 3, 3), np.float32), [0, 1], tmp_path / "a.onnx")
    monkeypatch.setattr(network, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'ONNX needs onnxruntime; pip install "ips-pipeline\[onnx\]"'):
        read_network(settings(path))


def test_px_are_tissue_by_class_or_by_probability(toy: Path) -> None:
    output = np.random.default_rng(5).normal(0, 2, (3, 7, 11)).astype(np.float32)
    output[:, 0, 0] = 1.0  # all alike: the first class
    named = {"classes": ["fat", "glass", "tumour"], "tissue": ["fat", "tumour"]}
    expected = np.array(
        [[max(range(3), key=lambda c: (output[c, y, x], -c)) != 1 for x in range(11)] for y in range(7)]
    )
    assert (is_tissue(output, settings(toy, **named)) == expected).all()
    assert expected[0, 0]
    powers = np.exp(output.astype(np.float64))
    share = (powers[0] + powers[2]) / powers.sum(axis=0)
    assert (is_tissue(output, settings(toy, **named, threshold=0.8)) == (share >= 0.8)).all()
    probabilities = (powers / powers.sum(axis=0)).astype(np.float32)
    asked = settings(toy, **named, threshold=0.8, outputs="probabilities")
    assert (is_tissue(probabilities, asked) == (share >= 0.8)).all()
    one = {"classes": ["tissue"]}
    assert (is_tissue(output[:1], settings(toy, **one)) == (output[0] >= 0)).all()
    assert (is_tissue(output[:1], settings(toy, **one, threshold=0.9)) == (output[0] >= np.log(9))).all()
    huge = np.full((1, 1, 2), 1e9, np.float32) * [1, -1]
    assert is_tissue(huge.astype(np.float32), settings(toy, **one)).tolist() == [[True, False]]
