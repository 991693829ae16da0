"""Task heads: one linear layer on one token, giving logits; and what those logits mean as probabilities."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["binary", "multiclass", "multilabel", "regression", "survival"]
"""binary: one logit. multiclass: one a class, exclusive. multilabel: one a label, independent. regression: the values
themselves. survival: one a time bin, logits of the discrete hazard."""


def linear_head(kind: Kind, dim: int, classes: int) -> nn.Linear:
    """A head for a task of `kind` on tokens of width `dim`.

    Args:
        kind: what the head's logits mean.
        dim: D.
        classes: classes, labels, values or time bins; a binary task has 2 classes and one logit.

    Raises:
        ValueError: `classes` does not suit `kind`, or there is no such kind.
    """
    _check_kind(kind)
    if kind == "binary" and classes != 2:
        raise ValueError(f"classes={classes}: a binary task has 2; use multiclass or multilabel for others")
    if classes < (2 if kind == "multiclass" else 1):
        raise ValueError(f"classes={classes} is too few for a {kind} task")
    return nn.Linear(dim, 1 if kind == "binary" else classes)


def probabilities(kind: Kind, logits: Tensor) -> Tensor:
    """What a head's logits (B, K) mean.

    binary (B, 1) -> (B, 2), the second being the positive class; multiclass -> (B, K) summing to 1;
    multilabel -> (B, K) each on its own; regression -> the values; survival -> (B, K), the probability of no event
    until the end of each time bin.

    Raises:
        ValueError: there is no such kind.
    """
    _check_kind(kind)
    if kind == "binary":
        positive = logits.sigmoid()
        return torch.cat((1 - positive, positive), dim=-1)
    if kind == "multiclass":
        return logits.softmax(dim=-1)
    if kind == "multilabel":
        return logits.sigmoid()
    if kind == "survival":
        return torch.cumprod(1 - logits.sigmoid(), dim=-1)
    return logits


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} is not a kind of task; use one of {list(get_args(Kind))}")
