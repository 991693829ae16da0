"""Strided convolutions on maps where oneDNN alone reads memory that is not its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ips.network.aggregator import Aggregator
from ips.network.encoder import WrappedEncoder
from ips.network.model import IPSModel
from ips.network.strided import Strided, guard

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


def test_any_network_is_guarded_as_an_encoder() -> None:
    """Same values, names and hooks; convolutions without stride and classes of their own are left alone."""

    class Own(nn.Conv2d):
        pass

    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), Own(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, (2, 1), 1),
        nn.Conv2d(8, 16, 3, 2, 1, padding_mode="reflect"), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    before, x = copy.deepcopy(network), torch.rand(2, 3, 37, 29)
    calls: list[int] = []
    network[0].register_forward_hook(lambda _m, _i, out: calls.append(out.shape[3]))
    model = IPSModel(network, Aggregator(16, 1), {"t": nn.Linear(16, 1)})
    assert [type(part) for part in list(network)[:5]] == [Strided, nn.Conv2d, Own, nn.Conv2d, nn.Conv2d]
    assert torch.equal(model.embed((x * 255).byte()), before((x * 255).byte() / 255))
    assert calls == [15]
    assert list(network.state_dict()) == list(before.state_dict())
    guard(network)  # again: nothing more to do
    assert type(WrappedEncoder(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1)), 8, 3).network[0]) is Strided  # type: ignore[index]
    assert type(copy.deepcopy(network)[0]) is Strided
