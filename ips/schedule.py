"""Learning rate as a pure function of the step, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, floor: float = 1e-3) -> float:
    """Multiplier of the learning rate at `step` (0-based): linear to 1, then a cosine down to `floor`.

    The official schedule, one step earlier: theirs spends step 0 at rate 0. Steps past the end stay at `floor`.

    Raises:
        ValueError: `warmup_steps` is negative or exceeds `total_steps`.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps={warmup_steps} must lie in 0..total_steps={total_steps}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: trainable weights decay; biases, norms and the learned queries do not.

    Each parameter stands in one group; frozen ones (`requires_grad` False) in none.
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith("queries")  # biases and norms are vectors
            (keep if plain else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
