"""Losses on logits, one a task, with missing labels and class weights.

Each task gives a sum and a weight, not a mean, so that several batches or processes can be averaged exactly: add the
sums, add the weights, divide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812, the usual name

from ips.network.heads import Kind


class LossSum(NamedTuple):
    """Scalars: the summed loss of the labelled images and the summed weight they carry."""

    total: Tensor
    weight: Tensor


def task_loss(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    kinds: Mapping[str, Kind],
    class_weights: Mapping[str, Tensor] | None = None,
) -> dict[str, LossSum]:
    """Loss of every task in `kinds`.

    Targets of B images by kind; NaN is a missing label everywhere, -1 everywhere but in regression:
    binary (B,) of 0 and 1; multiclass (B,) class numbers; multilabel (B, K) of 0 and 1; regression (B,) or (B, K);
    survival (B, 2): the time bin and 1 where the event was seen, 0 where the patient was censored in that bin.

    Args:
        outputs: task -> logits (B, K), as the model gives them.
        targets: task -> targets.
        kinds: task -> kind.
        class_weights: task -> (K,) weights of the classes ((2,) for binary), for binary and multiclass tasks.

    Raises:
        ValueError: a task without outputs or targets, an unknown kind, targets or class weights that do not fit the
            logits, class weights of another task, or negative or not finite.
    """
    if strange := [task for task in class_weights or {} if task not in kinds]:
        raise ValueError(f"class_weights names {strange}; the tasks are {list(kinds)}")
    losses = {}
    for task, kind in kinds.items():
        for name, given in (("outputs", outputs), ("targets", targets)):
            if task not in given:
                raise ValueError(f"{name} has no task {task!r}, only {list(given)}")
        if kind not in _KINDS:
            raise ValueError(f"kinds[{task!r}]={kind!r} is not a kind of task; use one of {list(_KINDS)}")
        logits, target = _at_least_float32(outputs[task]), targets[task].to(outputs[task].device)
        if logits.ndim != 2 or target.ndim == 0:
            found = f"outputs[{task!r}] has shape {tuple(logits.shape)}, targets[{task!r}] {tuple(target.shape)}"
            raise ValueError(f"{found}; needs logits (B, K) and a target an image, (B,) or (B, K)")
        if len(target) != len(logits):
            raise ValueError(f"targets[{task!r}] has {len(target)} images, the logits have {len(logits)}")
        weights = None if class_weights is None else class_weights.get(task)
        losses[task] = _KINDS[kind](task, logits, target, weights)
    return losses


def mean_loss(losses: Mapping[str, LossSum]) -> Tensor:
    """Mean over tasks of total / weight; a task without any label in the batch adds 0 (and its gradient is 0).

    Raises:
        ValueError: no task.
    """
    if not losses:
        raise ValueError("losses holds no task; pass what `task_loss` gives for one at least")
    means = [loss.total / torch.where(loss.weight > 0, loss.weight, 1.0) for loss in losses.values()]
    return torch.stack(means).mean()


def _binary(task: str, logits: Tensor, target: Tensor, weights: Tensor | None) -> LossSum:
    if logits.shape != (len(target), 1):
        raise ValueError(f"outputs[{task!r}] has shape {tuple(logits.shape)}; a binary task needs ({len(target)}, 1)")
    _check_one_each(task, target)
    _check_weights(task, weights, 2)
    target = target.to(logits.dtype).reshape(-1, 1)
    known = _known(target)
    labels = target.where(known, 0.0)
    _check_range(task, labels, 2)
    scale = known.to(logits.dtype) if weights is None else known * weights.to(labels)[labels.long()]
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return LossSum((loss * scale).sum(), scale.sum())


def _multiclass(task: str, logits: Tensor, target: Tensor, weights: Tensor | None) -> LossSum:
    _check_one_each(task, target)
    _check_weights(task, weights, logits.shape[1])
    target = target.flatten()
    known = _known(target)
    _check_range(task, target.where(known, 0), logits.shape[1])
    labels = target.where(known, 0).long()
    scale = known.to(logits.dtype) if weights is None else known * weights.to(logits)[labels]
    return LossSum((F.cross_entropy(logits, labels, reduction="none") * scale).sum(), scale.sum())


def _multilabel(task: str, logits: Tensor, target: Tensor, weights: Tensor | None) -> LossSum:
    _no_weights(task, weights)
    target = _same_shape(task, logits, target)
    known = _known(target)
    labels = target.where(known, 0.0)
    _check_range(task, labels, 2)
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return LossSum((loss * known).sum(), known.sum().to(logits.dtype))


def _regression(task: str, logits: Tensor, target: Tensor, weights: Tensor | None) -> LossSum:
    _no_weights(task, weights)
    target = _same_shape(task, logits, target)
    if target.isinf().any():
        raise ValueError(f"targets[{task!r}] holds infinity; missing values are NaN")
    known = ~target.isnan()
    error = (logits - target.where(known, logits.detach())).square()
    return LossSum(error.sum(), known.sum().to(logits.dtype))


def _survival(task: str, logits: Tensor, target: Tensor, weights: Tensor | None) -> LossSum:
    """Negative log-likelihood of discrete hazards (Zadeh and Schmid 2020): a censored patient survived its bin."""
    _no_weights(task, weights)
    target = _spread(target, (len(logits), 2))
    if target.shape != (len(logits), 2):
        raise ValueError(f"targets[{task!r}] has shape {tuple(target.shape)}; survival needs ({len(logits)}, 2)")
    known = _known(target).all(dim=1)
    time, event = target.where(known[:, None], 0).unbind(1)
    _check_range(task, time, logits.shape[1])
    _check_range(task, event, 2)
    bins = torch.arange(logits.shape[1], device=logits.device)
    died = (bins == time[:, None]) & (event == 1)[:, None]
    survived = (bins <= time[:, None]) & ~died
    loss = -(F.logsigmoid(logits) * died + F.logsigmoid(-logits) * survived).sum(dim=1)
    return LossSum((loss * known).sum(), known.sum().to(logits.dtype))


_KINDS: Mapping[str, Callable[[str, Tensor, Tensor, Tensor | None], LossSum]] = {
    "binary": _binary,
    "multiclass": _multiclass,
    "multilabel": _multilabel,
    "regression": _regression,
    "survival": _survival,
}


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _known(target: Tensor) -> Tensor:
    return ~(target.isnan() | (target == -1))


def _spread(target: Tensor, shape: torch.Size | tuple[int, int]) -> Tensor:
    """Where no image of the batch has a label, whose shape nobody knows (`ips.collate`), NaN of `shape`."""
    unknown = target.ndim == 1 and target.shape != shape and bool(target.isnan().all())
    return target.new_full(shape, torch.nan) if unknown else target


def _same_shape(task: str, logits: Tensor, target: Tensor) -> Tensor:
    target = _spread(target, logits.shape)
    if target.numel() != logits.numel():
        raise ValueError(f"targets[{task!r}] has shape {tuple(target.shape)}, the logits {tuple(logits.shape)}")
    return target.to(logits).reshape(logits.shape)


def _check_range(task: str, labels: Tensor, classes: int) -> None:
    if ((labels < 0) | (labels >= classes)).any() or (labels.is_floating_point() and (labels % 1 != 0).any()):
        raise ValueError(f"targets[{task!r}] holds labels outside 0..{classes - 1}; missing ones are NaN or -1")


def _check_one_each(task: str, target: Tensor) -> None:
    if target.numel() != len(target):
        raise ValueError(f"targets[{task!r}] has shape {tuple(target.shape)}; needs ({len(target)},), a class an image")


def _check_weights(task: str, weights: Tensor | None, classes: int) -> None:
    if weights is not None and weights.shape != (classes,):
        raise ValueError(f"class_weights[{task!r}] has shape {tuple(weights.shape)}; needs ({classes},)")
    if weights is not None and not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError(f"class_weights[{task!r}] is {weights.tolist()}; weights must be finite and >= 0")


def _no_weights(task: str, weights: Tensor | None) -> None:
    if weights is not None:
        raise ValueError(f"class_weights[{task!r}]: only binary and multiclass tasks take class weights")
