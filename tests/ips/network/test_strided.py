"""Strided convolutions on maps where oneDNN alone reads memory that is not its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ips.network.aggregator import Aggregator
from ips.network.encoder import ResNet, WrappedEncoder
from ips.network.model import IPSModel
from ips.network.strided import Strided
from ips.selection.select import select
from tests.ips.nets import bag_of

MAPS = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (9, 2), (13, 1), (2, 5), (5, 3), (13, 4), (33, 7)]
CONVOLUTIONS = [
    {"in_channels": 64, "kernel_size": 3, "stride": 2, "padding": 1},
    {"in_channels": 3, "kernel_size": 7, "stride": 2, "padding": 3},
    {"in_channels": 3, "kernel_size": 4, "stride": 4, "padding": 0},
    {"in_channels": 24, "kernel_size": 3, "stride": 3, "padding": 1, "groups": 4},
    {"in_channels": 16, "kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
]


@pytest.mark.parametrize(
    ("settings", "h", "w"),
    [(s, h, w) for s in CONVOLUTIONS for h, w in MAPS if min(h, w) + 2 * s["padding"] >= s["kernel_size"]],
)
def test_it_is_the_convolution_in_bfloat16_too(settings: dict[str, int], h: int, w: int) -> None:
    """Value and gradients against float64."""
    torch.manual_seed(0)
    conv = Strided(out_channels=24, bias=False, **settings)  # type: ignore[arg-type]
    plain = nn.Conv2d(out_channels=24, bias=False, **settings).double()  # type: ignore[arg-type]
    plain.load_state_dict(conv.state_dict())
    inputs = settings["in_channels"]
    x = torch.randn(8, inputs, h, w)
    expected = plain(x.double())
    slope = torch.randn(expected.shape) / (expected[:, 0].numel() ** 0.5)  # gradients of about 1
    (expected * slope).sum().backward()
    for _ in range(3):
        _junk = torch.full((8, inputs + 24, h + 2, w + 2), 3e30)  # so that what is read beyond is not zero by chance
        del _junk
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = conv(x)
        (found.float() * slope).sum().backward()
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
        assert conv.weight.grad is not None
        torch.testing.assert_close(conv.weight.grad.double(), plain.weight.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("width", [1, 3])
def test_a_map_too_narrow_for_any_output_stays_an_error(width: int) -> None:
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        Strided(3, 8, 4, 4)(torch.rand(2, 3, 9, width))


def test_padding_may_have_a_name() -> None:
    conv = Strided(3, 8, (3, 2), (1, 2), padding="valid")
    x = torch.rand(2, 3, 9, 3)
    assert conv(x).shape == (2, 8, 7, 1)
    assert torch.allclose(conv(x), nn.functional.conv2d(x, conv.weight, conv.bias, (1, 2)))


class _Own(nn.Conv2d):
    pass


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(input=x, weight=self.weight, stride=2, padding=1)


def _network() -> nn.Sequential:
    """Of 29 px, the maps are 15, 15, 8, 4 and 2 wide, then a single column."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), _Own(8, 8, 3, 2, 1), _Functional(),
        nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1, padding_mode="reflect"), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip


class _Widths(TorchFunctionMode):
    """Columns of what every convolution gives, of the outputs that oneDNN is asked for."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def __torch_function__(self, func, _types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's
        out = func(*args, **(kwargs or {}))
        self.found += [out.shape[-1]] if func is torch.conv2d else []
        return out


def _model(network: nn.Module) -> IPSModel:
    return IPSModel(network, Aggregator(16, 1, 2, 4, 4, 8), {"t": nn.Linear(16, 1)})


def test_a_network_of_the_users_stays_as_it_is() -> None:
    network, x = _network(), (torch.rand(2, 3, 37, 29) * 255).byte()
    before, kinds = copy.deepcopy(network), [type(part) for part in network]
    model = _model(network)
    WrappedEncoder(network, 16, 3)
    assert [type(part) for part in network] == kinds
    assert list(network.state_dict()) == list(before.state_dict())
    assert torch.equal(model.embed(x), before(x / 255))
    assert type(ResNet("resnet18").conv1) is Strided


@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "wrapped"])
def test_no_convolution_of_any_network_is_asked_for_a_single_column(kind: str) -> None:
    network, seen = _network(), _Widths()
    model = _model(WrappedEncoder(network, 16, 3) if kind == "wrapped" else network)
    x = (torch.rand(2, 3, 37, 29) * 255).byte()
    expected = model.embed(x)
    if kind == "bfloat16":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind != "bfloat16"), seen:
        found = model.embed(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    assert len(seen.found) == 6
    assert seen.found[-1] == 2
    assert min(seen.found) == 2


@pytest.mark.parametrize("in_place", [True, False])
def test_nor_is_one_in_the_selection(*, in_place: bool) -> None:
    if in_place:
        model = _model(_network())
    else:
        encoder = ResNet("resnet18", 4)
        encoder.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)  # type: ignore[assignment]
        model = IPSModel(encoder, Aggregator(512, 1, 2, 4, 4, 8), {"t": nn.Linear(512, 1)})
    seen, bag = _Widths(), bag_of(9, h=37, w=2 if not in_place else 29)
    with seen:
        select(model, [bag], 3, 8, dtype=torch.bfloat16)
    assert min(width for width in seen.found if width) == (2 if in_place else 1)  # of stride 1, one column is right
    first = seen.found[0]
    assert first == (15 if in_place else 2)


def test_in_float32_a_single_column_is_asked_for_as_it_is() -> None:
    seen = _Widths()
    with seen:
        _model(_network()).embed((torch.rand(2, 3, 37, 29) * 255).byte())
    assert seen.found[-1] == 1
