"""What a task's label is: how the cohort writes it, what the loss reads, what a prediction is measured against.

| kind | in the cohort | label | target of the loss | truth |
|---|---|---|---|---|
| binary, multiclass | a class | its name | its number | the same |
| multilabel | `a;c`, or `-` for none | the same, in the order of the classes | 0 or 1 a label | the same |
| regression | a number | the number | (number - mean) / std | the number |
| survival | time; 0 or 1 for the event | `12.5`, or `12.5+` where censored | time bin, event | time, event |

A missing label is None, its numbers are NaN. A class may be written as an equal number (1, 1.0, 01). Where the classes
of a binary task are one of `NO` and one of `YES`, as the default ones are, any of these words is read, in any case: no
and False are 0.
"""

from __future__ import annotations

import json
import math
import shlex
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pipeline.config.data import TaskConfig

Label = str | float
Numbers = float | tuple[float, ...]
"""One number, or a tuple for multilabel and survival tasks."""

NONE = "-"
"""A multilabel slide on which no label holds."""
MISSING = {"", "nan", "na", "n/a", "null", "none", "<na>"}
NO = {"0", "false", "no", "off"}
YES = {"1", "true", "yes", "on"}
_SHOWN = 20  # values of a column; with more it holds no classes


class NotAClass(ValueError):
    """A cell with `texts` that are no classes of its task."""

    def __init__(self, task: TaskConfig, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        super().__init__(f"column {task.column!r}: {_names(texts)} is no class of task {task.name}")


def is_missing(task: TaskConfig, row: Mapping[str, str]) -> bool:
    """Whether a row of the cohort says nothing about the task."""
    return any(row[name].casefold() in MISSING and row[name] not in task.classes for name in task.columns)


def read_label(task: TaskConfig, row: Mapping[str, str]) -> Label | None:
    """The label in a row of the cohort, None where it is missing; ValueError says what is wrong with it."""
    if is_missing(task, row):
        return None
    text = row[task.column]
    if task.kind == "multilabel":
        held = set(_classes(task, [part.strip() for part in text.split(";")])) if text != NONE else set()
        return ";".join(name for name in task.classes if name in held) or NONE
    if task.kind in ("binary", "multiclass"):
        return _classes(task, [text])[0]
    value = finite(text)
    if value is None:
        point = text.replace(",", ".")
        hint = f"; write it with a point, as in {point}" if finite(point) is not None else ""
        raise ValueError(f"column {task.column!r}: {text!r} is not a number, as task {task.name} needs{hint}")
    if task.kind == "regression":
        return value
    if value < 0:
        raise ValueError(f"column {task.column!r}: the time {text!r} of task {task.name} is negative")
    event = _yes_or_no(row[task.event_column or ""])
    if event is None:
        raise ValueError(
            f"column {task.event_column!r}: {row[task.event_column or '']!r} is neither 1 (the event of task "
            f"{task.name} was seen) nor 0 (censored)"
        )
    return f"{value!r}" if event else f"{value!r}+"


def target(task: TaskConfig, label: Label | None) -> Numbers:
    """What `ips.learning.losses.task_loss` reads of one slide."""
    values = truth(task, label)
    if isinstance(values, tuple):
        if task.kind == "multilabel" or label is None:
            return values
        time, event = values
        end = bisect_left(task.bins, time)
        last = len(task.bins) - 1
        return (float(end), event) if end <= last else (float(last), 0.0)
    return (values - task.mean) / task.std if task.kind == "regression" else values


def is_label(task: TaskConfig, label: Label | None) -> bool:
    """Whether a label that was read for some task may be one of this task; a missing one always is."""
    match task.kind:
        case _ if label is None:
            return True
        case "multilabel":
            return label == NONE or set(str(label).split(";")) <= set(task.classes)
        case "regression":
            return not isinstance(label, str)
        case "survival":
            return isinstance(label, str) and finite(label.removesuffix("+")) is not None
    return label in task.classes


def truth(task: TaskConfig, label: Label | None) -> Numbers:
    """What a prediction of one slide is measured against."""
    if task.kind == "multilabel":
        held = None if label is None else str(label).split(";")
        return tuple(math.nan if held is None else float(name in held) for name in task.classes)
    if task.kind == "survival":
        return (math.nan, math.nan) if label is None else _time_and_event(str(label))
    if label is None:
        return math.nan
    return float(label) if task.kind == "regression" else float(task.classes.index(str(label)))


def stratum(task: TaskConfig, label: Label | None) -> int:
    """What splits are stratified by; -1 where the label is missing.

    The class; of a multilabel slide the last label that holds, 0 for none; the event; regression has one stratum.
    """
    if label is None:
        return -1
    values = truth(task, label)
    if task.kind == "multilabel":
        assert isinstance(values, tuple)
        return max((place for place, held in enumerate(values, start=1) if held), default=0)
    if task.kind == "survival":
        assert isinstance(values, tuple)
        return int(values[1])
    return 0 if task.kind == "regression" else task.classes.index(str(label))


def class_weights(task: TaskConfig, labels: Iterable[Label | None]) -> tuple[float, ...] | None:
    """Weight of each class in the loss, by the labels of the training slides; a class that none has weighs 1."""
    if task.class_weights != "balanced":
        return task.class_weights
    tally = Counter(label for label in labels if label is not None)
    return tuple(tally.total() / (len(task.classes) * tally[name]) if tally[name] else 1.0 for name in task.classes)


def lacks(task: TaskConfig, labels: Iterable[Label | None]) -> str | None:
    """Why nothing can be learned or measured from these labels, and what would help; None where something can."""
    known = [label for label in labels if label is not None]
    if not known:
        return "no label; label some slides"
    if task.kind in ("binary", "multiclass"):
        if len(set(known)) < 2:
            return f"only class {known[0]!r}; add slides of the other classes of {_names(task.classes)}"
    elif task.kind == "multilabel":
        if len(set(known)) < 2:
            return f"only labels {known[0]!r}; add slides on which other labels of {_names(task.classes)} hold"
    elif task.kind == "regression":
        if len(set(known)) < 2:
            return f"only the value {known[0]}; add slides with other values"
    elif not _comparable([_time_and_event(str(label)) for label in known]):
        return "no event before another patient's time; add slides of patients in whom the event was seen"
    return None


def counts(task: TaskConfig, labels: Iterable[Label | None]) -> str:
    """The labels of some slides in a few words."""
    found = list(labels)
    known = [label for label in found if label is not None]
    if task.kind == "regression":
        values = [float(label) for label in known]
        parts = [f"{len(values)} values" + (f" from {min(values):g} to {max(values):g}" if values else "")]
    elif task.kind == "survival":
        seen = sum(not str(label).endswith("+") for label in known)
        parts = [f"events: {seen}", f"censored: {len(known) - seen}"]
    else:
        several = task.kind == "multilabel"
        tally = Counter(name for label in known for name in (str(label).split(";") if several else [str(label)]))
        shown = (*task.classes, NONE) if several and tally[NONE] else task.classes
        parts = [f"{name}: {tally[name]}" for name in shown]
    return ", ".join([*parts, f"unlabelled: {len(found) - len(known)}"] if len(known) < len(found) else parts)


def finite(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def other_classes(task: TaskConfig, field: str, others: Mapping[str, int], labels: Iterable[Label | None]) -> str:
    """What to say of a column with values that are not classes of the task, in one line.

    Args:
        task: whose column it is.
        field: where the task stands in the config, as in tasks.0.
        others: those values -> their rows.
        labels: those of the other rows.
    """
    several = task.kind == "multilabel"
    known = {name for label in labels if label is not None for name in (str(label).split(";") if several else [label])}
    values = sorted({*others, *map(str, known - {NONE})}, key=_order)
    shown = ", ".join(
        f"{value!r} ({rows} row{'s' * (rows > 1)})"
        for value, rows in sorted(others.items(), key=lambda x: _order(x[0]))[:_SHOWN]
    )
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    what = f"{shown}{more} {'are not classes' if len(others) > 1 else 'is not a class'} of task {task.name}"
    mend = "mend the cells, or " if known else ""
    return f"column {task.column!r}: {what} ({_names(task.classes)}); {mend}{_remedy(task, field, values)}"


def _remedy(task: TaskConfig, field: str, values: Sequence[str]) -> str:
    """The overrides that make these values the task's classes, ready to be pasted into a shell."""
    if len(values) > _SHOWN:
        number = f", or set {field}.kind=regression" if all(finite(value) is not None for value in values) else ""
        return f"name a column of classes in {field}.column{number}"
    if len(values) < 2:
        return f"name all classes in {field}.classes"
    setting = shlex.quote(f"{field}.classes={json.dumps(list(values), ensure_ascii=False, separators=(',', ':'))}")
    if task.kind == "binary" and len(values) > 2:
        return f"set {field}.kind=multiclass {setting}"
    return f"set {setting}" + (", the positive class last" if task.kind == "binary" else "")


def _order(text: str) -> tuple[float, str]:
    """Numbers by value, then words by letters."""
    value = finite(text)
    return (math.inf if value is None else value, text)


def _classes(task: TaskConfig, texts: Sequence[str]) -> list[str]:
    """Classes as the task spells them; NotAClass with all texts that are none."""
    found = [(text, _class(task, text)) for text in texts]
    if others := [text for text, name in found if name is None]:
        raise NotAClass(task, others)
    return [name for _, name in found if name is not None]


def _class(task: TaskConfig, text: str) -> str | None:
    """The class of the same text, the same number, or the same answer of yes and no."""
    if text in task.classes:
        return text
    value = finite(text)
    for name in task.classes:
        if value is not None and finite(name) == value:
            return name
    answer, answers = _yes_or_no(text), [_yes_or_no(name) for name in task.classes]
    if task.kind == "binary" and set(answers) == {False, True} and answer is not None:
        return task.classes[answers.index(answer)]
    return None


def _yes_or_no(text: str) -> bool | None:
    """What a word or number answers; None where it is no answer."""
    value, word = finite(text), text.casefold()
    if value in (0.0, 1.0):
        return bool(value)
    return word in YES if word in YES | NO else None


def _time_and_event(label: str) -> tuple[float, float]:
    return float(label.rstrip("+")), float(not label.endswith("+"))


def _comparable(outcomes: Sequence[tuple[float, float]]) -> bool:
    """Whether some event came before another time."""
    latest = max(time for time, _ in outcomes)
    return any(event and time < latest for time, event in outcomes)


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
