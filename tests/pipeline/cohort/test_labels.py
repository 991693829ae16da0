from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ips.learning.losses import task_loss
from pipeline.cohort.labels import (
    Label,
    NotAClass,
    class_weights,
    counts,
    is_label,
    lacks,
    read_label,
    stratum,
    target,
    truth,
)
from pipeline.config.data import TaskConfig

GRADE = TaskConfig(name="grade", column="g", kind="multiclass", classes=("low grade", "mid", "none"))
DIGITS = TaskConfig(name="digits", column="d", kind="multilabel", classes=("0", "1", "9"))
AGE = TaskConfig(name="age", column="a", kind="regression", mean=50, std=20)
DEATH = TaskConfig(name="death", column="months", kind="survival", event_column="died", bins=(6, 12, 36))
PLAIN = TaskConfig(name="plain", column="p")
ABSENT = TaskConfig(name="absent", column="p", classes=("Yes", "No"))


@pytest.mark.parametrize(
    ("task", "row", "label", "numbers"),
    [
        (GRADE, {"g": "none"}, "none", 2.0),
        (GRADE, {"g": "NA"}, None, math.nan),
        (DIGITS, {"d": "9; 01"}, "1;9", (0.0, 1.0, 1.0)),
        (DIGITS, {"d": "-"}, "-", (0.0, 0.0, 0.0)),
        (DIGITS, {"d": ""}, None, (math.nan,) * 3),
        (AGE, {"a": "60"}, 60.0, 0.5),
        (AGE, {"a": "nan"}, None, math.nan),
        (DEATH, {"months": "6", "died": "1"}, "6.0", (0.0, 1.0)),
        (DEATH, {"months": "6.5", "died": "0"}, "6.5+", (1.0, 0.0)),
        (DEATH, {"months": "36.5", "died": "1"}, "36.5", (2.0, 0.0)),
        (DEATH, {"months": "90", "died": "0"}, "90.0+", (2.0, 0.0)),
        (DEATH, {"months": "90", "died": ""}, None, (math.nan, math.nan)),
        (DEATH, {"months": "90", "died": "TRUE"}, "90.0", (2.0, 0.0)),
        (PLAIN, {"p": "False"}, "0", 0.0),
        (PLAIN, {"p": "TRUE"}, "1", 1.0),
        (PLAIN, {"p": "no"}, "0", 0.0),
        (PLAIN, {"p": "On"}, "1", 1.0),
        (PLAIN, {"p": "none"}, None, math.nan),
        (ABSENT, {"p": "1.0"}, "Yes", 0.0),
        (ABSENT, {"p": "off"}, "No", 1.0),
    ],
)
def test_labels_and_their_targets(task: TaskConfig, row: dict[str, str], label: Label | None, numbers: object) -> None:
    assert read_label(task, row) == label
    assert is_label(task, label)
    assert target(task, label) == pytest.approx(numbers, nan_ok=True)


@pytest.mark.parametrize(
    ("task", "label"), [(GRADE, "high"), (GRADE, 1.0), (DIGITS, "1;7"), (AGE, "60.0"), (DEATH, "soon"), (DEATH, 6.0)]
)
def test_labels_of_another_task_are_none(task: TaskConfig, label: Label) -> None:
    assert not is_label(task, label)


def test_truth_is_in_the_column_s_unit() -> None:
    assert truth(AGE, 60.0) == 60.0
    assert truth(DEATH, "36.5") == (36.5, 1.0)
    assert truth(DEATH, "1e-05+") == (1e-05, 0.0)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (GRADE, {"g": "high"}, "column 'g': 'high' is no class of task grade"),
        (DIGITS, {"d": "8;1;7"}, "column 'd': '8', '7' is no class of task digits"),
        (AGE, {"a": "old"}, "column 'a': 'old' is not a number, as task age needs"),
        (
            AGE,
            {"a": "60,5"},
            "column 'a': '60,5' is not a number, as task age needs; write it with a point, as in 60.5",
        ),
        (DEATH, {"months": "-1", "died": "1"}, "column 'months': the time '-1' of task death is negative"),
        (DEATH, {"months": "1", "died": "maybe"}, "column 'died': 'maybe' is neither 1"),
    ],
)
def test_what_is_wrong_is_said(task: TaskConfig, row: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is compared whole below
        read_label(task, row)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "task",
    [
        TaskConfig(name="t", column="c", classes=("0", "2")),
        TaskConfig(name="t", column="c", classes=("yes", "maybe")),
        TaskConfig(name="t", column="c", classes=("on", "yes")),
        TaskConfig(name="t", column="c", kind="multiclass", classes=("0", "1", "2")),
        TaskConfig(name="t", column="c", kind="multilabel", classes=("0", "1")),
    ],
    ids=str,
)
def test_yes_is_no_class_where_the_classes_are_no_answers(task: TaskConfig) -> None:
    with pytest.raises(NotAClass):
        read_label(task, {"c": "true"})


@given(st.floats(0, 1e6), st.booleans())
def test_any_time_is_a_target_the_loss_takes_and_survives_its_text(time: float, event: bool) -> None:  # noqa: FBT001
    label = read_label(DEATH, {"months": repr(time), "died": str(int(event))})
    assert truth(DEATH, label) == (time, float(event))
    loss = task_loss({"d": torch.zeros(1, 3)}, {"d": torch.tensor([target(DEATH, label)])}, {"d": "survival"})["d"]
    bins = sum(time > end for end in DEATH.bins[:-1]) + 1
    assert float(loss.total) == pytest.approx(bins * math.log(2), rel=1e-6)


def test_strata() -> None:
    assert [stratum(GRADE, label) for label in ("mid", None)] == [1, -1]
    assert [stratum(DIGITS, label) for label in ("0;9", "-", None)] == [3, 0, -1]
    assert [stratum(AGE, label) for label in (3.0, None)] == [0, -1]
    assert [stratum(DEATH, label) for label in ("3.0", "3.0+", None)] == [1, 0, -1]


@pytest.mark.parametrize(
    ("task", "poor", "rich", "said"),
    [
        (GRADE, ["mid", None, "mid"], ["mid", "none"], "only class 'mid'; add slides of the other classes"),
        (DIGITS, ["0;9", "0;9"], ["0", "9"], "only labels '0;9'"),
        (AGE, [3.0, 3.0], [3.0, 4.0], "only the value 3.0"),
        (DEATH, ["3.0+", "4.0"], ["3.0", "4.0+"], "no event before another patient's time"),
        (AGE, [None], [3.0, 4.0], "no label"),
    ],
)
def test_what_cannot_be_learned(
    task: TaskConfig, poor: list[Label | None], rich: list[Label | None], said: str
) -> None:
    assert str(lacks(task, poor)).startswith(said)
    assert lacks(task, rich) is None


def test_balanced_weights_make_classes_count_alike() -> None:
    labels = ["mid"] * 6 + ["none"] * 2 + [None]
    given = GRADE.model_copy(update={"class_weights": "balanced"})
    assert class_weights(given, labels) == (1.0, 8 / 18, 8 / 6)
    assert class_weights(GRADE, labels) is None
    assert class_weights(GRADE.model_copy(update={"class_weights": (1.0, 2.0, 3.0)}), labels) == (1.0, 2.0, 3.0)


def test_counts() -> None:
    assert counts(GRADE, ["low grade", None, "none", "none"]) == "low grade: 1, mid: 0, none: 2, unlabelled: 1"
    assert counts(DIGITS, ["0;9", "9", "-"]) == "0: 1, 1: 0, 9: 2, -: 1"
    assert counts(AGE, [3.5, 70.0, None]) == "2 values from 3.5 to 70, unlabelled: 1"
    assert counts(AGE, [None]) == "0 values, unlabelled: 1"
    assert counts(DEATH, ["3.0", "4.0+"]) == "events: 1, censored: 1"
