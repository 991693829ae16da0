"""Learning rate as a pure function of the step, and as a scheduler of torch; and which parameters decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, floor: float = 1e-3) -> float:
    """Multiplier of the learning rate at `step` (0-based): linear to 1, then a cosine down to `floor`.

    The official schedule, one step earlier: theirs spends step 0 at rate 0. Steps past the end stay at `floor`.

    Raises:
        ValueError: `warmup_steps` is negative or exceeds `total_steps`.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps={warmup_steps} must lie in 0..total_steps={total_steps}")
    if step >= total_steps:
        return floor
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine_scheduler(optimizer: Optimizer, warmup_steps: int, total_steps: int, floor: float = 1e-3) -> LambdaLR:
    """`warmup_cosine` as a scheduler of torch; call its `step` after each step of the optimiser.

    A group's rate is the optimiser's times its `lr_scale`, where it has one (see `parameter_groups`).

    Raises:
        ValueError: where `warmup_cosine` raises it.
    """

    def scaled(scale: float) -> Callable[[int], float]:
        return lambda step: scale * warmup_cosine(step, warmup_steps, total_steps, floor)

    return LambdaLR(optimizer, [scaled(group.get("lr_scale", 1.0)) for group in optimizer.param_groups])


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimiser: trainable weights decay; biases, norms and the learned queries do not.

    Each parameter stands in one group; frozen ones (`requires_grad` False) in none.

    Args:
        model: of any kind.
        weight_decay: of the groups that decay.
        lr_scales: prefix of names -> multiplier of the learning rate, which the group has as `lr_scale` for
            `warmup_cosine_scheduler`, or whoever else sets `lr`; parameters without such a prefix have 1.

    Returns:
        For every multiplier, in the order of the model, a group that decays and one that does not.
    """
    groups: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = next((scale for prefix, scale in (lr_scales or {}).items() if name.startswith(prefix)), 1.0)
        plain = parameter.ndim < 2 or name.endswith("queries")  # biases and norms are vectors
        groups.setdefault(scale, ([], []))[plain].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for scale, kinds in groups.items()
        for parameters, decay in zip(kinds, (weight_decay, 0.0), strict=True)
    ]
