"""What a model's maps are worth: what each patch does to the outputs, and what becomes of these as patches go or come.

Attention says where a model looks, not what that does. The effect of a patch is what an output, as log odds, loses
without it: the pool over the same patches but this one, in closed form from what the selection has seen
(`ips.network.effects`). It is exact for what the outputs are pooled of, which with `select.context: all` is every
patch, else the M selected ones; to the outputs the others do nothing, but that one of them could be selected instead.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ips.network.effects import effects, growing
from ips.network.heads import probabilities
from ips.network.model import IPSModel
from pipeline.config.data import TaskConfig
from pipeline.inference.prediction import BagPrediction, Pooled, in_unit

FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the patches, at which the curves are known."""
_CERTAIN = 1e-12  # probabilities nearer to 0 or 1 count as this near: log odds of 28

Curve = dict[str, list[float | None]]


@dataclass(frozen=True)
class Explanation:
    """Of one bag."""

    effect: Mapping[str, npt.NDArray[np.float32]]
    """Output column -> (N,): what the log odds of the output gain by each patch; of a regression its value, in the
    label's unit. 0 for patches that the outputs are not pooled of."""
    curves: Mapping[str, Any]
    """`fraction`, ascending from 0 to 1; and of each order of the patches (attention, effect, random) `deletion` and
    `insertion`: output column -> the output with that share of them, the first in the order, left out, or alone. None
    where no patch is left. The effect is that on the first task's likeliest output."""

    def of(self, rows: slice) -> Explanation:
        """Of some of the patches; the curves stay those of all."""
        return replace(self, effect={column: values[rows] for column, values in self.effect.items()})


def explain(model: IPSModel, tasks: Sequence[TaskConfig], found: BagPrediction, seed: str) -> Explanation | None:
    """The effects and curves of a bag; None where its pool does not tell, or is of one patch.

    Args:
        model: that predicted it.
        tasks: of the model.
        found: with what it was pooled of.
        seed: of the random order.
    """
    pooled = found.pooled
    if pooled is None or len(pooled.rows) < 2:
        return None
    said = effects(model, pooled.values)
    effect: dict[str, npt.NDArray[np.float32]] = {}
    for task in tasks:
        change = _odds(task, said.outputs[task.name][None]) - _odds(task, said.without[task.name])
        for column, own in zip(task.output_columns, change.T, strict=True):
            effect[column] = np.zeros(len(found.attention), np.float32)
            effect[column][pooled.rows] = own.astype(np.float32)
    leading = tasks[0].output_columns[int(found.values[tasks[0].name].argmax())]
    orders: dict[str, npt.NDArray[Any]] = {
        "attention": found.attention[pooled.rows],
        "effect": effect[leading][pooled.rows],
        "random": np.random.default_rng(zlib.crc32(seed.encode())).random(len(pooled.rows)),
    }
    return Explanation(effect, _curves(model, tasks, pooled, orders))


def _odds(task: TaskConfig, logits: Tensor) -> npt.NDArray[np.float64]:
    """Logits (n, K') -> log odds of the outputs (n, K); of a regression the values, in the label's unit."""
    if task.kind == "regression":
        return in_unit(task, logits)
    return np.asarray(torch.logit(probabilities(task.kind, logits.double()), eps=_CERTAIN).numpy())


def _curves(
    model: IPSModel, tasks: Sequence[TaskConfig], pooled: Pooled, orders: Mapping[str, npt.NDArray[Any]]
) -> dict[str, Any]:
    n = len(pooled.rows)
    counts = sorted({round(share * n) for share in FRACTIONS})
    curves: dict[str, Any] = {"fraction": [count / n for count in counts]}
    left, series = [n - count for count in reversed(counts[:-1])], []
    for keys in orders.values():
        order = torch.from_numpy(np.argsort(-keys, kind="stable"))
        series += [(order.flip(0), left), (order, counts[1:])]
    found = growing(model, pooled.values, series)
    for name, kept, alone in zip(orders, found[::2], found[1::2], strict=True):
        curves[name] = {
            "deletion": {column: [*values[::-1], None] for column, values in _columns(tasks, kept)},
            "insertion": {column: [None, *values] for column, values in _columns(tasks, alone)},
        }
    return curves


def _columns(tasks: Sequence[TaskConfig], logits: Mapping[str, Tensor]) -> Iterator[tuple[str, list[float]]]:
    """Output columns, and their values at each count."""
    for task in tasks:
        yield from zip(task.output_columns, in_unit(task, logits[task.name]).T.tolist(), strict=True)
