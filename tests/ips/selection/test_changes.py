from __future__ import annotations

import torch
from torch import nn

from ips.selection.changes import look


def test_a_look_changes_with_what_is_looked_at_alone() -> None:
    linear = nn.Linear(3, 3)
    module = nn.Sequential(linear, nn.BatchNorm1d(3))
    before = look([module])
    module(torch.rand(4, 3)).sum().backward()
    moved = look([module])
    assert moved.structure == before.structure
    assert moved.content != before.content  # the running statistics
    with torch.no_grad():
        linear.weight.add_(1)
    written = look([module])
    assert written.content != moved.content
    module.eval()(torch.rand(4, 3))
    assert look([module]) == written


def test_another_tensor_hook_or_precision_is_another_structure() -> None:
    module = nn.Linear(3, 3)
    looks = [look([module])]
    module.register_forward_hook(lambda _m, _i, out: out)
    looks.append(look([module]))
    module.weight = nn.Parameter(module.weight.detach().clone())
    looks.append(look([module]))
    looks.append(look([module.double()]))
    assert len({one.structure for one in looks}) == 4


def test_the_step_of_any_optimiser_counts() -> None:
    module = nn.Linear(3, 3)
    before = look([module])
    module(torch.rand(4, 3)).sum().backward()
    torch.optim.AdamW(module.parameters(), fused=True).step()
    assert look([module]).content != before.content


def test_tensors_of_inference_mode_are_never_the_same() -> None:
    with torch.inference_mode():
        module = nn.Linear(3, 3)
    assert look([module]).content != look([module]).content
