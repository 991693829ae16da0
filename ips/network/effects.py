"""What each patch does to the outputs: the pool over all patches but one, in closed form.

Without patch n the pool of head j is V_j (x_mean - a_n x_n) / (1 - a_n), so from the logits and values that a scoring
pass has seen, every output without every patch costs one call of the token's layers and the heads; no patch is encoded
again. Where a_n is so near 1 that the difference would be rounding, the others are summed instead: at most one patch a
head and task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ips.bag import Values
from ips.network.model import IPSModel, evaluating

_BLOCK = 4096  # patches at a time: bounds the tokens held at once
_DOMINANT = 0.5  # of the attention; up to there 1 - a_n keeps all digits but one


class Effects(NamedTuple):
    """What the model says of one image with all its patches, and with each left out."""

    outputs: Mapping[str, Tensor]
    """Task -> logits (K,) of all patches."""
    without: Mapping[str, Tensor]
    """Task -> logits (N, K) without patch n."""

    def changes(self) -> dict[str, Tensor]:
        """Task -> (N, K): what each patch adds to the logits."""
        return {task: self.outputs[task] - without for task, without in self.without.items()}


@torch.no_grad()
def effects(model: IPSModel, values: Values) -> Effects:
    """Outputs of one image, pooled over all N patches, with and without each of them; on the host.

    Args:
        model: the one that selected; dropout is not applied.
        values: `Selection.values` of the image, as `select(..., values=True)` gives them.

    Raises:
        ValueError: an image of one patch, which leaves nothing; where `IPSModel.pooling` raises it.
    """
    N, pooling = len(values.logits), model.pooling
    if N < 2:
        raise ValueError("values: the image has 1 patch, and without it there is nothing to say")
    logits, each = values.logits.double(), values.values.double()
    weights = logits.softmax(dim=0).view(N, pooling.attention.heads, pooling.tasks)
    whole = torch.einsum("nht,nhv->htv", weights, each)
    with evaluating(model), torch.autocast(model.mean.device.type, enabled=False):
        outputs = {task: x[0] for task, x in _outputs(model, whole[None]).items()}
        parts = [
            _outputs(model, _left(whole, a.unsqueeze(-1), values_.unsqueeze(2)))
            for a, values_ in zip(torch.split(weights, _BLOCK), torch.split(each, _BLOCK), strict=True)
        ]
        without = {task: torch.cat([part[task] for part in parts]) for task in outputs}
        for n in (weights.flatten(1) > _DOMINANT).any(dim=1).nonzero().flatten().tolist():
            others = torch.arange(N) != n
            again = logits[others].softmax(dim=0).view(N - 1, *weights.shape[1:])
            for task, x in _outputs(model, torch.einsum("nht,nhv->htv", again, each[others])[None]).items():
                without[task][n] = x[0]
    return Effects(outputs, without)


@torch.no_grad()
def growing(model: IPSModel, values: Values, series: Sequence[tuple[Tensor, Sequence[int]]]) -> list[dict[str, Tensor]]:
    """Outputs of one image pooled over ever more of its patches: of each series task -> logits (len(counts), K).

    Each patch enters a series once, so a curve of insertion or, by the order reversed, of deletion costs one pass; the
    token's layers take the pools of all series at once. On the host.

    Args:
        model: the one that selected; dropout is not applied.
        values: see `effects`.
        series: (N,) rows, in the order they enter, and counts: how many have entered, ascending, from 1.

    Raises:
        ValueError: where `IPSModel.pooling` raises it.
    """
    logits, each = values.logits.double(), values.values.double()
    pools = [pool for order, counts in series for pool in _pools(model, logits[order], each[order], counts)]
    with evaluating(model), torch.autocast(model.mean.device.type, enabled=False):
        outputs = _outputs(model, torch.stack(pools))
    parts = {task: torch.split(x, [len(counts) for _, counts in series]) for task, x in outputs.items()}
    return [{task: x[number] for task, x in parts.items()} for number in range(len(series))]


def _pools(model: IPSModel, logits: Tensor, each: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The pool (H, T, D_v) of the first so many patches, at each count."""
    shape = (model.pooling.attention.heads, model.pooling.tasks)
    mass, mean, pools = torch.full(shape, -torch.inf, dtype=torch.float64), each.new_zeros(*shape, each.shape[-1]), []
    for low, high in pairwise((0, *counts)):
        part = logits[low:high].view(-1, *shape)
        own = part.logsumexp(dim=0)
        added = torch.einsum("nht,nhv->htv", (part - own).exp(), each[low:high])
        both = torch.logaddexp(mass, own)
        mean = (mass - both).exp().unsqueeze(-1) * mean + (own - both).exp().unsqueeze(-1) * added
        mass = both
        pools.append(mean)
    return pools


def _left(whole: Tensor, a: Tensor, values: Tensor) -> Tensor:
    """The pool without each of some patches; of no use where a is `_DOMINANT`."""
    return (whole - a * values) / (1 - a).clamp_min(1 - _DOMINANT)


def _outputs(model: IPSModel, pooled: Tensor) -> dict[str, Tensor]:
    """Pooled values (n, H, T, D_v) -> task -> logits (n, K)."""
    pooling = model.pooling
    mixed = pooling.attention.mixed(pooled.to(model.mean))
    outputs: dict[str, Tensor] = model.heads(pooling.tokens(mixed))
    return {task: x.cpu() for task, x in outputs.items()}
