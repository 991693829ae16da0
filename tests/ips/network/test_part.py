from __future__ import annotations

import torch
from torch import nn

from ips.network.aggregator import Aggregator
from ips.network.encoder import FeatureProjector, ResNet
from ips.network.part import PatchEncoder, Scores, can_be_read
from ips.network.pooling import GatedAttention


def test_our_encoders_declare_what_they_take() -> None:
    pixels, features = ResNet("resnet18", 2, 1), FeatureProjector(9, 12)
    assert isinstance(pixels, PatchEncoder)
    assert (pixels.dim, pixels.channels, pixels.inputs) == (128, 1, None)
    assert isinstance(features, PatchEncoder)
    assert (features.dim, features.channels, features.inputs) == (12, None, 9)


def test_what_can_select_is_told_by_what_it_can_do() -> None:
    assert isinstance(Aggregator(12, 1), Scores)
    assert not isinstance(GatedAttention(12, 1), Scores)
    assert not isinstance(nn.Linear(3, 3), Scores)


def test_only_what_is_at_hand_is_read() -> None:
    assert can_be_read(torch.ones(3))
    assert not can_be_read(torch.ones(3, device="meta"))
