from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ips.bag import Batch, TensorBag
from ips.network.encoder import FeatureProjector, ResNet, TwoScales
from ips.selection.select import gather, select
from pipeline.config.encoders import PRESETS, Preset
from pipeline.config.model import EncoderConfig, TrainConfig
from pipeline.errors import ConfigError, StorageError
from pipeline.model import build
from pipeline.model.build import build_encoder, build_model, build_optimizer, check_encoder, preset_network
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


def test_the_encoder_s_own_rate_and_the_same_rate() -> None:
    model = build_model(small_config())
    optimizer = build_optimizer(model, TrainConfig(lr=1e-3, encoder_lr=1e-4))
    assert [group["lr_scale"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1, 1, 1])
    assert [group["lr_scale"] for group in build_optimizer(model, TrainConfig()).param_groups] == [1, 1]


DIGITS: dict[str, object] = {
    "cohort": {"uri": "cohort.csv", "megapixel_mnist": {"folder": "mnist"}},
    "tiling": {"patch_px": 32, "mpp": None, "tissue": "none"},
    "train": {"augment": False},
}


@pytest.mark.parametrize("positions", ["none", "index", "grid"])
@pytest.mark.parametrize("pool", ["attention", "gated", "mean", "max"])
def test_every_pool_and_position(pool: str, positions: str) -> None:
    plain = {
        "encoder": {"stages": 2, "channels": 1},
        "aggregator": {"pool": pool, "heads": 2, "key_dim": 4, "hidden_dim": 16},
        "select": {"mode": "every"},
        "positions": positions,
        "mean": [0.5],
        "std": [0.25],
    }
    model = build_model(small_config(model=plain, **DIGITS))
    patches = torch.randint(0, 256, (1, 3, 1, 17, 13), dtype=torch.uint8)
    where = torch.tensor([[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]])
    batch = Batch(patches, where, torch.arange(3)[None], torch.ones(1, 3, dtype=torch.bool))
    assert model(batch)["tumour"].shape == (1, 1)


STORED: dict[str, object] = {"embed": {"encoder": {"name": "resnet50"}}, "train": {"augment": False}}


def test_stored_features_are_projected(tmp_path: Path) -> None:
    model = build_model(small_config(model={"encoder": {"name": "features", "features": 24}}, **STORED))
    bags = [TensorBag(torch.randn(n, 24)) for n in (9, 4)]
    batch = gather(bags, select(model, bags, 3, 5), "cpu")
    assert model(batch)["tumour"].shape == (2, 1)
    save_file(FeatureProjector(24, 40).state_dict(), tmp_path / "w.safetensors")
    encoder = {"name": "features", "features": 24, "dim": 40, "weights": str(tmp_path / "w.safetensors")}
    assert build_model(small_config(model={"encoder": encoder}, **STORED)).encoder.dim == 40


def test_a_width_that_has_no_positions_is_named() -> None:
    plain = {"encoder": {"name": "features", "features": 24, "dim": 6}, "positions": "grid"}
    with pytest.raises(ConfigError, match="model.positions: grid: dim=6 must be a multiple of 4"):
        build_model(small_config(model=plain, **STORED))


def test_timm_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"model.encoder.name: timm:vit_tiny .*pip install 'ips-pipeline\[timm\]'"):
        build_model(small_config(model={"encoder": {"name": "timm:vit_tiny"}}))


class _Patches(nn.Sequential):
    num_features, head_hidden_size = 10, 12  # as in MobileNetV3: a layer stands behind the features
    pretrained_cfg: Mapping[str, object] = {
        "input_size": (3, 32, 32),
        "classifier": "3.fc",
    }  # inside a layer that stays

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 10, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 12))


class _OneSize(_Patches):
    """As the vision transformers."""

    pretrained_cfg: Mapping[str, object] = {"input_size": (3, 48, 48), "classifier": ("head", "head_dist")}

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 48, f"Input height ({x.shape[-1]}) doesn't match model (48)."
        for layer in self:
            x = layer(x)
        return x


class _Timm(types.ModuleType):
    """What the adapter uses of timm; the real one imports only with the torchvision of the torch at hand."""

    def is_model(self, name: str) -> bool:
        return name in ("vit_tiny", "vit_48")

    def list_models(self, pattern: str) -> list[str]:
        return ["vit_tiny"] if pattern == "*vit*" else []

    def create_model(self, name: str, **options: object) -> nn.Module:
        assert options == {"pretrained": False, "in_chans": 3, "num_classes": 0}
        return _Patches() if name == "vit_tiny" else _OneSize()


def test_a_timm_network_selects_and_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "timm", _Timm("timm"))
    torch.manual_seed(0)
    save_file(_Patches().state_dict(), tmp_path / "w.safetensors")
    model = build_model(
        small_config(model={"encoder": {"name": "timm:vit_tiny", "weights": str(tmp_path / "w.safetensors")}})
    )
    bags = [TensorBag(torch.randint(0, 256, (n, 3, 16, 12), dtype=torch.uint8)) for n in (9, 4)]
    model(gather(bags, select(model, bags, 3, 5), "cpu"))["tumour"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    with pytest.raises(ValueError, match="needs 3 channels"):
        select(model, [TensorBag(torch.zeros(5, 1, 16, 12))], 3, 5)
    with pytest.raises(ConfigError, match=r"timm has no network 'vit_huge'; near it are \['vit_tiny'\]"):
        build_model(small_config(model={"encoder": {"name": "timm:vit_huge"}}))


def test_a_network_of_one_size_is_named_with_that_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", _Timm("timm"))
    encoder = EncoderConfig(name="timm:vit_48")
    plain = {"model": {"encoder": encoder.model_dump()}}
    with pytest.raises(ConfigError, match=r"(?s)name: timm:vit_48 cannot take patches of 32 px \(Input.*patch_px=48"):
        build_model(small_config(**plain))
    model = build_model(small_config(**plain, tiling={"patch_px": 48, "mpp": None}))
    assert all(module.training for module in model.modules())
    with pytest.raises(ConfigError, match=r"embed.encoder.name: timm:vit_48 cannot take patches of 256 px"):
        check_encoder("embed.encoder", encoder, 256)
    check_encoder("embed.encoder", encoder, 48)


@pytest.mark.parametrize(("name", "classifier"), [("vit_tiny", ["3.fc"]), ("vit_48", ["head", "head_dist"])])
def test_the_classifier_of_timm_weights_is_passed_over(
    name: str, classifier: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "timm", _Timm("timm"))
    file, state = tmp_path / "w.safetensors", _Patches().state_dict()
    encoder = EncoderConfig(name=f"timm:{name}", weights=str(file))
    for layer in classifier:
        state |= {f"{layer}.weight": torch.zeros(1000, 12), f"{layer}.bias": torch.zeros(1000)}
    save_file(state, file)
    network = build_encoder(encoder)[0].get_submodule("network")
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    save_file({**state, "other.weight": torch.zeros(3), "headless.weight": torch.zeros(3)}, file)
    with pytest.raises(ConfigError, match="2 names do not fit .*: unexpected headless.weight; unexpected other.weight"):
        build_encoder(encoder)


SMALL = {"image": 28, "patch": 14, "dim": 12, "depth": 1, "heads": 2, "hidden": 16}


@pytest.fixture
def small_presets(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Preset]:
    """The table with networks of a few thousand weights in the place of a billion."""
    own: dict[str, Mapping[str, Any]] = {"uni": SMALL, "phikon-v2": SMALL}
    own["conch15"] = {**SMALL, "placed": 14, "pool": "attention", "pooled": 16}
    own["virchow2"] = {**SMALL, "registers": 2, "pool": "class+mean"}
    small = {name: replace(PRESETS[name], architecture=made) for name, made in own.items()}
    monkeypatch.setattr(build, "PRESETS", small)
    return small


def test_a_preset_s_published_weights_are_loaded(small_presets: Mapping[str, Preset], tmp_path: Path) -> None:
    for name in small_presets:
        network = preset_network(name)
        state = network.state_dict()
        torch.save(state, tmp_path / "w.bin")
        encoder, dim = build_encoder(EncoderConfig(name=name, weights=str(tmp_path / "w.bin")))
        x = torch.randn(2, 3, 32, 32)
        with torch.inference_mode():
            assert torch.equal(encoder(x), network(x))
        assert dim == network.dim


def test_weights_of_another_network_are_named(small_presets: Mapping[str, Preset], tmp_path: Path) -> None:
    torch.save(preset_network("virchow2").state_dict(), tmp_path / "w.bin")
    wrong = (
        r"embed.encoder.weights: .*w.bin: not the weights of uni: they are those of virchow2; give pytorch_model.bin"
    )
    with pytest.raises(ConfigError, match=rf"{wrong} of huggingface.co/MahmoodLab/UNI \(weights: 2 names do not fit"):
        build_encoder(EncoderConfig(name="uni", weights=str(tmp_path / "w.bin")))
    state = preset_network("uni").state_dict()
    theirs = {name.replace("cls_token", "embeddings.cls_token"): x for name, x in state.items()}
    torch.save(theirs, tmp_path / "t.bin")
    with pytest.raises(ConfigError, match="not the weights of uni: they are those of phikon-v2; give"):
        build_encoder(EncoderConfig(name="uni", weights=str(tmp_path / "t.bin")))
    save_file(ResNet("resnet18", 2).state_dict(), tmp_path / "r.safetensors")
    with pytest.raises(ConfigError, match=r"not the weights of uni: give .* and \d+ more\)"):
        build_encoder(EncoderConfig(name="uni", weights=str(tmp_path / "r.safetensors")))


def test_a_preset_selects_and_trains(small_presets: Mapping[str, Preset]) -> None:
    model = build_model(small_config(model={"encoder": {"name": "uni"}}))
    bags = [TensorBag(torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)) for n in (9, 4)]
    batch = gather(bags, select(model, bags, 3, 5), "cpu")
    model(batch)["tumour"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


def test_with_surroundings_the_encoder_looks_twice(tmp_path: Path) -> None:
    trunk = ResNet("resnet18", 2)
    save_file(trunk.state_dict(), tmp_path / "trunk.safetensors")
    config = small_config(
        tiling={"patch_px": 32, "mpp": 0.5, "context_mpp": 2.0},
        model={"encoder": {"stages": 2, "weights": str(tmp_path / "trunk.safetensors")}},
    )
    model = build_model(config)
    assert isinstance(model.encoder, TwoScales)
    assert model.dim == 2 * trunk.dim
    assert torch.equal(model.encoder.state_dict()["encoder.conv1.weight"], trunk.state_dict()["conv1.weight"])
    bag = TensorBag(torch.randint(0, 256, (9, 3, 64, 32), dtype=torch.uint8))
    found = select(model, [bag], 4, 4)
    assert model.eval()(gather([bag], found, "cpu"))["tumour"].shape == (1, 1)
    vectors = small_config(
        tiling={"context_mpp": 2.0}, model={"encoder": {"name": "features", "features": 6}}, train={"augment": False},
        embed={"encoder": {"name": "resnet18"}},
    )  # fmt: skip
    assert isinstance(build_model(vectors).encoder, FeatureProjector)
