from __future__ import annotations

import pytest
import torch

from ips.network.aggregator import Aggregator
from ips.network.encoder import ResNet
from ips.network.official import convert_official
from tests.oracle import OfficialNet


def test_tokens_are_the_official_transformers() -> None:
    torch.manual_seed(0)
    official = OfficialNet(ResNet("resnet18", 2), ["a", "b", "c"], 2, H=4, D_k=6, D_v=5, D_inner=9).eval()
    ours = Aggregator(128, 3, 4, 6, 5, 9).eval()
    state = convert_official(official.state_dict(), ["a", "b", "c"])
    state["aggregator.attention.heads_by_key_by_value"] = torch.empty(4, 6, 5, 0)
    ours.load_state_dict({n.removeprefix("aggregator."): v for n, v in state.items() if n.startswith("aggregator.")})
    x = torch.randn(2, 7, 128)
    torch.testing.assert_close(ours(x, torch.ones(2, 7, dtype=torch.bool)), official.transf(x))


def test_order_of_patches_does_not_matter_and_masks_cut() -> None:
    torch.manual_seed(0)
    aggregator = Aggregator(8, 2, 2, 3, 3, 5).eval()
    x, order = torch.randn(1, 11, 8), torch.randperm(11)
    every = torch.ones(1, 11, dtype=torch.bool)
    torch.testing.assert_close(aggregator(x, every), aggregator(x[:, order], every))
    mask = torch.arange(11)[None] < 6
    torch.testing.assert_close(aggregator(x, mask), aggregator(x[:, :6], every[:, :6]))
    assert aggregator.folded().shape == (4, 8)


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (
            torch.zeros(2, 5, 9),
            torch.ones(2, 5).bool(),
            r"x has shape \(2, 5, 9\), .*; needs \(B, M, 8\) and \(B, M\) bool",
        ),
        (torch.zeros(5, 8), torch.ones(5).bool(), r"x has shape \(5, 8\)"),
        (torch.zeros(2, 5, 8), torch.ones(2, 5), r"mask \(2, 5\) and torch.float32; needs"),
        (torch.zeros(2, 5, 8), torch.ones(2, 4).bool(), r"mask \(2, 4\)"),
        (torch.zeros(2, 5, 8), torch.arange(2)[:, None].repeat(1, 5).bool(), r"mask: image 0 of 2 has no patch"),
    ],
)
def test_what_cannot_be_pooled_is_named(x: torch.Tensor, mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Aggregator(8, 2, 2, 3, 3, 5)(x, mask)
