from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ips.bag import Batch
from ips.encoder import ResNet
from pipeline.build import build_model, build_optimizer
from pipeline.config_model import TrainConfig
from pipeline.errors import ConfigError, StorageError
from tests.pipeline.small import small_config


def test_the_model_has_the_config_s_tasks_and_positions() -> None:
    tasks = [
        {"name": "tumour", "column": "a"},
        {"name": "grade", "column": "b", "kind": "multiclass", "classes": ["g1", "g2", "g3"]},
    ]
    plain = {"encoder": {"stages": 2}, "aggregator": {"heads": 2, "key_dim": 4, "hidden_dim": 16}, "positions": "grid"}
    model = build_model(small_config(tasks=tasks, model=plain)).eval()
    batch = Batch(
        torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 3, 2),
        torch.arange(3).repeat(2, 1),
        torch.ones(2, 3, dtype=torch.bool),
    )
    assert {task: tuple(logits.shape) for task, logits in model(batch).items()} == {"tumour": (2, 1), "grade": (2, 3)}
    assert model.position is not None


def test_pretrained_weights_are_loaded_from_a_uri(tmp_path: Path) -> None:
    trunk = ResNet("resnet18", 2)
    save_file(trunk.state_dict(), tmp_path / "trunk.safetensors")
    plain = {"encoder": {"stages": 2, "weights": str(tmp_path / "trunk.safetensors")}}
    model = build_model(small_config(model=plain))
    for name, value in trunk.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value), name
    with pytest.raises(ConfigError, match=r"model.encoder.weights: .*missing layer3"):
        build_model(small_config(model={"encoder": {"stages": 4, "weights": str(tmp_path / "trunk.safetensors")}}))
    absent = small_config(model={"encoder": {"weights": str(tmp_path / "absent.pth")}})
    with pytest.raises(StorageError, match="absent.pth"):
        build_model(absent)
    build_model(absent, pretrained=False)


def test_norms_and_biases_do_not_decay() -> None:
    model = build_model(small_config())
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if parameter.ndim == 1 or name.endswith("queries") else 0.3), name
