"""What a `ResNet` may hold in place of its own layers, and still be scored as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ips.network.encoder import ResNet, TwoScales
from ips.network.model import IPSModel, evaluating
from ips.selection.fusing import fusable
from ips.selection.scorer import Scorer
from tests.ips.nets import bag_of, model_of, resnet_model


def _biased(encoder: ResNet) -> None:
    conv = nn.Conv2d(3, 64, 7, 2, 3)
    nn.init.normal_(conv.bias, 0, 2.0)  # type: ignore[arg-type]
    encoder.conv1 = conv  # type: ignore[assignment]


def _weight_norm(encoder: ResNet) -> None:
    norm = nn.utils.parametrizations.weight_norm(encoder.get_submodule("layer1.0.conv1"))
    with torch.no_grad():
        norm.parametrizations.weight.original0.mul_(1.7)


def _hooked_conv(encoder: ResNet) -> None:
    encoder.get_submodule("layer1.0.conv2").register_forward_hook(lambda _m, _i, out: out * 1.5)


def _hooked_norm(encoder: ResNet) -> None:
    encoder.bn1.register_forward_pre_hook(lambda _m, given: (given[0].abs(),))


def _group_norm(encoder: ResNet) -> None:
    encoder.bn1 = nn.GroupNorm(8, 64)  # type: ignore[assignment]


def _without_affine(encoder: ResNet) -> None:
    norm = nn.BatchNorm2d(64, affine=False)
    norm.running_mean, norm.running_var = encoder.bn1.running_mean, encoder.bn1.running_var
    encoder.bn1 = norm


def _synchronised(encoder: ResNet) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(encoder)  # type: ignore[no-untyped-call]


def _plain(model: IPSModel, patches: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(model):
        return model.logits(model.embed(patches), None)


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (_biased, 10), (_weight_norm, 9), (_hooked_conv, 9), (_hooked_norm, 9), (_group_norm, 9),
        (_without_affine, 10), (_synchronised, 10),
    ],
)  # fmt: skip
def test_changed_layers_are_scored_as_they_are(change: Callable[[ResNet], None], fused: int) -> None:
    """Before and after a refresh."""
    model, patches = resnet_model(), bag_of(8, h=37, w=29).patches
    assert isinstance(model.encoder, ResNet)
    before = _plain(model, patches)
    change(model.encoder)
    assert len(fusable(model.encoder)) == fused
    scorer = Scorer(model, batch=8)
    found = scorer.content(patches)[0]
    torch.testing.assert_close(found, _plain(model, patches), rtol=1e-4, atol=1e-3)
    if change not in (_without_affine, _synchronised):
        assert not torch.allclose(found, before, rtol=1e-3, atol=1e-2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    scorer.refresh()
    torch.testing.assert_close(scorer.content(patches)[0], _plain(model, patches), rtol=1e-3, atol=1e-2)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_the_old_weight_norm_is_scored_in_place() -> None:
    model, patches = resnet_model(), bag_of(8, h=37, w=29).patches
    conv = nn.utils.weight_norm(model.encoder.get_submodule("layer1.0.conv1"))
    for _ in range(2):
        with torch.no_grad():
            conv.get_parameter("weight_g").mul_(1.7)
        scorer = Scorer(model, batch=8)
        assert scorer._encoder is model.encoder
        with scorer.evaluating():
            found = scorer.content(patches)[0]
        torch.testing.assert_close(found, _plain(model, patches), rtol=1e-4, atol=1e-3)
    model.train().embed(patches).sum().backward()  # type: ignore[no-untyped-call]
    assert conv.get_parameter("weight_g").grad is not None


def test_a_resnet_at_two_scales_is_fused_too() -> None:
    inner = resnet_model().encoder
    assert isinstance(inner, ResNet)
    model, patches = model_of(TwoScales(inner), 2 * inner.dim, scale=20.0), bag_of(8, h=74, w=37).patches
    assert len(fusable(model.encoder)) == len(fusable(inner)) == 10
    scorer = Scorer(model, batch=8)
    assert scorer._encoder is not model.encoder
    torch.testing.assert_close(scorer.content(patches)[0], _plain(model, patches), rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    scorer.refresh()
    torch.testing.assert_close(scorer.content(patches)[0], _plain(model, patches), rtol=1e-3, atol=1e-2)
