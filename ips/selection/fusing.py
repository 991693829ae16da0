"""Batch norms multiplied into the convolutions before them: the same map at the running statistics, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ips.network.encoder import resnet_in
from ips.network.strided import Strided


def fusable(encoder: nn.Module) -> list[tuple[str, str]]:
    """Names of its ResNet's convolutions and norms that are plain; others, hooked or parametrised, run as they are."""
    found = resnet_in(encoder)
    if found is None:
        return []
    prefix, resnet = found
    return [
        (prefix + conv, prefix + norm)
        for conv, norm in resnet.conv_norm_pairs()
        if _is_plain(resnet.get_submodule(conv), (nn.Conv2d, Strided))
        and _is_plain(resnet.get_submodule(norm), (nn.BatchNorm2d, nn.SyncBatchNorm))
    ]


def _is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks  # weight norm of old is a hook
    return type(module) in kinds and not hooked and not parametrize.is_parametrized(module)


def is_copied_whole(encoder: nn.Module) -> bool:
    """Whether parameters and buffers are all that its modules keep: other tensors cannot be followed in a copy.

    Hooks keep some: the `weight` of the old `torch.nn.utils.weight_norm`, which torch refuses to copy, too.
    """
    return not any(isinstance(kept, Tensor) for module in encoder.modules() for kept in vars(module).values())


def strip_norms(encoder: nn.Module, pairs: Sequence[tuple[str, str]]) -> None:
    """Give each convolution a bias and make its batch norm an identity."""
    for conv_name, norm_name in pairs:
        conv = encoder.get_submodule(conv_name)
        assert isinstance(conv, nn.Conv2d)
        conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=False)
        parent, _, leaf = norm_name.rpartition(".")
        setattr(encoder.get_submodule(parent), leaf, nn.Identity())


def fuse(conv: nn.Module, norm: nn.Module, fused: nn.Module) -> None:
    """Write norm(conv(x)), at the norm's running statistics, into `fused`.

    With g = w_n / std: weights w * g, bias (b - mean) * g + b_n.
    """
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    assert isinstance(fused, nn.Conv2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert fused.bias is not None
    mean = _double(norm.running_mean)
    gain, shift = 1 / (_double(norm.running_var) + norm.eps).sqrt(), torch.zeros_like(mean)
    if norm.affine:
        gain, shift = gain * _double(norm.weight), _double(norm.bias)
    bias = 0.0 if conv.bias is None else _double(conv.bias)
    fused.weight.copy_(conv.weight * gain.to(conv.weight.dtype).view(-1, 1, 1, 1))  # in float64: 3 times as long
    fused.bias.copy_((bias - mean) * gain + shift)


def _double(x: Tensor) -> Tensor:
    return x.detach().double()
