"""Task heads: one layer on one token, giving logits; their names; and what those logits mean as probabilities."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["binary", "multiclass", "multilabel", "regression", "survival"]
"""binary: one logit. multiclass: one a class, exclusive. multilabel: one a label, independent. regression: the values
themselves. survival: one a time bin, logits of the discrete hazard."""


class Head(nn.Module):
    """A head that says what its logits mean."""

    kind: Kind


class LinearHead(Head, nn.Linear):
    """One linear layer."""

    def __init__(self, kind: Kind, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.kind = kind


class Heads(nn.Module):
    """The heads of T tasks by name; the i-th reads the i-th token.

    In a state dict they are `<i>:<task>:<kind>`, without `:<kind>` where a head is no `Head`: weights of other tasks,
    of another order or of another meaning do not load.

    Raises:
        ValueError: a task whose name is no string or empty.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._paths: dict[str, str] = {}
        for place, (task, head) in enumerate(heads.items()):
            self._paths[task] = head_path(place, task, head.kind if isinstance(head, Head) else None)
            self.add_module(self._paths[task], head)

    @property
    def tasks(self) -> tuple[str, ...]:
        """In the order of their tokens."""
        return tuple(self._paths)

    @property
    def kinds(self) -> dict[str, Kind]:
        """Of the tasks whose heads say it."""
        return {task: head.kind for task, head in self.items() if isinstance(head, Head)}

    def __getitem__(self, task: str) -> nn.Module:
        return self.get_submodule(self._paths[task])

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """(task, head) pairs, in the order of their tokens."""
        return ((task, self[task]) for task in self._paths)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """(B, T, D) -> task -> logits (B, K)."""
        return {task: head(tokens[:, place]) for place, (task, head) in enumerate(self.items())}

    def named(self, state: Mapping[str, Tensor], prefix: str = "heads.") -> dict[str, Tensor]:
        """A state dict of an earlier version, whose heads have numbers alone, with the names of these.

        It does not hold the tasks' names: use it only where you know that their order is this one.
        """
        old = re.compile(re.escape(prefix) + r"(\d+)\.")
        paths = list(self._paths.values())

        def renamed(name: str) -> str:
            match = old.match(name)
            known = match is not None and int(match[1]) < len(paths)
            return f"{prefix}{paths[int(match[1])]}.{name[match.end() :]}" if match is not None and known else name

        return {renamed(name): value for name, value in state.items()}

    def _load_from_state_dict(  # torch lists the names that do not fit; what they mean is said here
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,  # noqa: FBT001, torch's signature
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = dict.fromkeys(name.removeprefix(prefix).split(".")[0] for name in state_dict if name.startswith(prefix))
        if strict and any(path.isdigit() for path in found):
            error_msgs.append(
                "its heads have numbers and no names, as an earlier version saved them; where you know that its tasks "
                f"are {list(self.tasks)} in this order, load model.named(state)"
            )
        elif strict and found and set(found) != set(self._paths.values()):
            error_msgs.append(
                f"it is of the heads {sorted(found)}, the model has {list(self._paths.values())} "
                "(<token>:<task>:<kind>); build the model with the same tasks, in the same order"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def head_path(place: int, task: str, kind: Kind | None) -> str:
    """Name of a head's module; `%`, `:` and `.` of the task's are percent-encoded, since no module's may hold a dot."""
    if not isinstance(task, str) or not task:
        raise ValueError(f"heads: {task!r} is not a name of a task; use a string of one character at least")
    safe = re.sub("[%:.]", lambda match: f"%{ord(match[0]):02X}", task)
    return f"{place}:{safe}" + ("" if kind is None else f":{kind}")


def linear_head(kind: Kind, dim: int, classes: int) -> LinearHead:
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
    return LinearHead(kind, dim, 1 if kind == "binary" else classes)


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
