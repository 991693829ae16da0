from __future__ import annotations

import torch
from torch import nn

from ips.selection.changes import structure


def _module() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


def test_weights_statistics_and_modes_are_no_structure() -> None:
    module = _module()
    before = structure([module], settings=True)
    module(torch.rand(4, 3, 5, 5)).sum().backward()
    module.eval()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert structure([module], settings=True) == before


def test_another_tensor_hook_precision_or_setting_is_another_structure() -> None:
    module = _module()
    conv, norm = module
    assert isinstance(conv, nn.Conv2d)
    looks = [structure([module], settings=True)]
    conv.register_forward_hook(lambda _m, _i, out: out)
    looks.append(structure([module], settings=True))
    conv.weight = nn.Parameter(conv.weight.detach().clone())
    looks.append(structure([module], settings=True))
    looks.append(structure([module.double()], settings=True))
    conv.forward = conv.forward  # type: ignore[method-assign]
    looks.append(structure([module], settings=True))
    plain = structure([module], settings=False)
    norm.eps = 0.5  # type: ignore[assignment]
    looks.append(structure([module], settings=True))
    conv.dilation = (2, 2)
    looks.append(structure([module], settings=True))
    conv.weight.data = torch.rand(2, 3, 1, 1).double()
    looks.append(structure([module], settings=True))
    assert all(one != other for place, one in enumerate(looks) for other in looks[:place])
    assert structure([module], settings=False) == plain
