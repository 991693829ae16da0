from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from ips.network.encoder import (
    FeatureProjector,
    ResNet,
    TwoScales,
    WrappedEncoder,
    load_weights,
    read_weights,
    resnet_in,
)

# name, stages -> width, parameters of the trunk (torchvision's count less its classifier: 512 * 1000 + 1000 and so on)
_TRUNKS = {
    ("resnet18", 4): (512, 11_689_512 - 513_000),
    ("resnet34", 4): (512, 21_797_672 - 513_000),
    ("resnet50", 4): (2048, 25_557_032 - 2_049_000),
    ("resnet18", 2): (128, 683_072),
    ("resnet50", 2): (512, 1_444_928),
}


@pytest.mark.parametrize(("name", "stages"), _TRUNKS)
def test_trunks_have_the_published_sizes(name: str, stages: int) -> None:
    encoder = ResNet(name, stages)  # type: ignore[arg-type]
    dim, parameters = _TRUNKS[name, stages]
    assert encoder.dim == dim
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
    assert encoder.eval()(torch.zeros(2, 3, 41, 67)).shape == (2, dim)


def test_names_are_torchvisions() -> None:
    names = set(ResNet("resnet50").state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer1.0.downsample.0.weight", "layer1.0.downsample.1.bias"} <= names
    assert {"layer4.2.conv3.weight", "layer4.2.bn3.num_batches_tracked", "layer3.5.bn2.weight"} <= names
    assert not any(name.startswith(("layer1.1.downsample", "fc")) for name in names)


def test_one_channel_and_halving() -> None:
    encoder = ResNet("resnet18", 2, 1)
    shapes: list[tuple[int, ...]] = []
    for layer in (encoder.conv1, encoder.maxpool, encoder.get_submodule("layer2")):
        layer.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape[1:])))
    encoder(torch.zeros(1, 1, 64, 96))
    assert shapes == [(64, 32, 48), (64, 16, 24), (128, 8, 12)]


def test_the_residual_is_added() -> None:
    """With all branch gains zero a block is relu(shortcut): the trunk must then pass the stem through."""
    encoder = ResNet("resnet18", 2).eval()
    with torch.no_grad():
        for name, module in encoder.named_modules():
            if name.endswith("bn2"):
                assert isinstance(module, nn.BatchNorm2d)
                module.weight.zero_()
    x = torch.rand(2, 3, 32, 32)
    stem = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x))))
    assert torch.equal(encoder.get_submodule("layer1")(stem), stem)


@pytest.mark.parametrize(
    ("maps", "n", "expected"),
    [(5, 8, [4, 4]), (4, 24, [4] * 6), (3, 24, [2] * 12), (100, 24, [24]), (23, 24, [8, 8, 8]), (0, 3, [1, 1, 1])],
)
def test_the_stem_runs_in_equal_parts_that_fit(maps: int, n: int, expected: list[int]) -> None:
    encoder, x = ResNet("resnet18", 2).eval(), torch.rand(n, 3, 38, 26, generator=torch.Generator().manual_seed(1))
    whole = encoder(x)
    encoder.stem_bytes = maps * 64 * 19 * 13 * 4
    parts: list[int] = []
    encoder.conv1.register_forward_hook(lambda _m, _i, out: parts.append(len(out)))
    torch.testing.assert_close(encoder(x), whole)
    assert parts == expected


def test_pooling_before_the_relu_changes_no_bit() -> None:
    encoder, x = ResNet("resnet18", 2), torch.rand(3, 3, 38, 26, generator=torch.Generator().manual_seed(1))
    gradients = []
    for stem in (encoder._stem, lambda x: encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x))))):
        encoder.zero_grad()
        out = stem(x)
        out.square().sum().backward()
        assert encoder.conv1.weight.grad is not None
        gradients.append((out.detach(), encoder.conv1.weight.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_pairs_are_each_convolution_with_its_norm(name: str) -> None:
    encoder = ResNet(name)
    pairs = list(encoder.conv_norm_pairs())
    assert len({conv for conv, _ in pairs}) == sum(isinstance(m, nn.Conv2d) for m in encoder.modules())
    assert len({norm for _, norm in pairs}) == sum(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())
    for conv, norm in pairs:
        first, second = encoder.get_submodule(conv), encoder.get_submodule(norm)
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.BatchNorm2d)
        assert first.out_channels == second.num_features


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg16",), "name='vgg16' is not a known encoder"),
        (("resnet18", 3), "stages=3"),
        (("resnet18", 2, 4), "channels=4"),
    ],
)
def test_bad_trunks_are_named(arguments: tuple[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(*arguments)


def test_projector_norms_projects_and_rectifies() -> None:
    torch.manual_seed(0)
    projector = FeatureProjector(9, 4)
    x = torch.randn(50, 9) * 7 + 3
    y = projector(x)
    assert y.shape == (50, 4)
    assert y.min() == 0
    torch.testing.assert_close(projector(x * 5 - 2), y, rtol=1e-3, atol=1e-3)  # layer norm undoes scale and shift


def _pth(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _full_state() -> dict[str, Tensor]:
    """As torchvision gives it: four stages and a classifier."""
    torch.manual_seed(1)
    state = ResNet("resnet18").state_dict()
    return {**state, "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


@pytest.mark.parametrize("form", ["safetensors", "pth", "state", "path", "str"])
def test_weights_load_from_every_form(form: str, tmp_path: Path) -> None:
    state = _full_state()
    file = tmp_path / "weights.pth"
    file.write_bytes(_pth(state))
    source = {"safetensors": save(state), "pth": _pth(state), "state": state, "path": file, "str": str(file)}[form]
    for stages in (2, 4):
        encoder = ResNet("resnet18", stages)
        load_weights(encoder, source)  # type: ignore[arg-type]
        assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())


def test_safetensors_reader_knows_the_types() -> None:
    state = {
        "a": torch.randn(3, 2),
        "b": torch.arange(5),
        "c": torch.randn(4).bfloat16(),
        "d": torch.randn(2, 2).half(),
        "e": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
    }
    read = read_weights(save(state, metadata={"format": "pt"}))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) and read[name].dtype == state[name].dtype for name in state)


def test_all_unfitting_names_are_listed_and_nothing_is_loaded() -> None:
    encoder = ResNet("resnet18", 2)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = _full_state()
    del state["layer1.0.bn1.weight"]
    state["layer2.7.conv1.weight"] = torch.zeros(1)
    state["head.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    state["layer2.0.bn2.bias"] = torch.full((128,), torch.nan)
    with pytest.raises(ValueError, match="5 names do not fit ResNet") as caught:
        load_weights(encoder, state)
    for part in (
        "missing layer1.0.bn1.weight",
        "unexpected layer2.7.conv1.weight",
        "unexpected head.weight",
        "conv1.weight has shape (64, 1, 7, 7), needs (64, 3, 7, 7)",
        "layer2.0.bn2.bias holds NaN",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    "data", [b"", b"not weights at all", _pth({"a": 3}), _pth([torch.zeros(2)]), _pth({0: torch.zeros(2)})]
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^weights: "):
        read_weights(data)


def test_a_whole_network_is_refused_with_how_to_save_it() -> None:
    with pytest.raises(
        ValueError, match=r"^weights: neither .*Linear, which is no tensor and was not run; save them"
    ) as e:
        read_weights(_pth(nn.Linear(2, 3)))
    assert "weights_only" not in str(e.value)


def test_old_files_without_batch_counts_load() -> None:
    state = {name: value for name, value in _full_state().items() if not name.endswith("num_batches_tracked")}
    load_weights(ResNet("resnet18"), state)


def test_a_wrapped_network_is_checked_when_it_is_used() -> None:
    encoder = WrappedEncoder(nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 6, 1)
    assert encoder(torch.zeros(5, 1, 7, 11)).shape == (5, 6)
    with pytest.raises(ValueError, match=r"Conv2d gives shape \(5, 6, 5, 9\) for \(5, 1, 7, 11\).*gives \(5, 6\)"):
        WrappedEncoder(nn.Conv2d(1, 6, 3), 6, 1)(torch.zeros(5, 1, 7, 11))


def test_at_two_scales_embeddings_stand_side_by_side() -> None:
    torch.manual_seed(0)
    encoder = ResNet("resnet18", 2)
    both = TwoScales(encoder).eval()
    patches, around = torch.rand(5, 3, 37, 37), torch.rand(5, 3, 37, 37)
    with torch.no_grad():
        found = both(torch.cat([patches, around], dim=2))
        wanted = [encoder(patches), encoder(around)]
    assert both.dim == found.shape[1] == 256
    assert both.channels == 3
    torch.testing.assert_close(found, torch.cat(wanted, dim=1), rtol=1e-5, atol=1e-5)
    assert resnet_in(both) == ("encoder.", encoder)
    assert resnet_in(TwoScales(WrappedEncoder(nn.Identity(), 4, 3))) is None
    with pytest.raises(ValueError, match="patches are 37 x 37 px; with surroundings below they are twice as high"):
        both(patches)
