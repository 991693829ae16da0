"""The sections that say when a model is trained again, and what it must show before it replaces the champion."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Fraction, Positive, Section

Action = Literal["block", "hold"]
"""What a rule that is not met does. block: the model is rejected. hold: it waits for a person (`promote --approve`)."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_DURATION = re.compile(r"^(\d+(?:\.\d+)?)([smhdw])$")


def seconds(duration: str) -> float:
    """`90s`, `30m`, `12h`, `8d` or `2w` in seconds; ValueError for anything else."""
    found = _DURATION.fullmatch(duration)
    if found is None:
        raise ValueError("is no duration; write a number and s, m, h, d or w, as in 8d")
    return float(found[1]) * _UNITS[found[2]]


class FloorRule(Section):
    """A measure of the candidate that must reach a bound on the frozen test."""

    measure: str
    """auc, accuracy, exact_match, r2, mae or c_index, as the task has (`inference.metrics`)."""
    bound: float
    """The least value; of mae, the greatest."""
    task: str | None = None
    """null: the first one."""
    least: Positive = 10
    """Patients below which the test is too small to judge by; the model is then held."""
    action: Action = "block"


class NoWorseRule(Section):
    """The candidate must be shown to be no worse than the champion: non-inferiority on the same patients.

    Met where the lower bound of the difference, candidate minus champion, lies above -margin (of mae: the other way
    round): the most careful of several (`gate.no_worse`). Held where what the test shows is good enough, and its
    patients are too few to exclude a loss of the margin that sits in few of them.
    """

    margin: Annotated[float, Field(ge=0)] = 0.02
    """Largest loss that is of no consequence, in the measure's unit."""
    level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of the one-sided interval."""
    measure: str | None = None
    """null: the task's first one."""
    task: str | None = None
    """null: the first one."""
    least: Positive = 50
    """Patients below which the test is too small to judge by; the model is then held. With more of them the margin says
    how many are needed: 133 of the rarer class for .02, 52 for .05, 25 for .1."""
    resamples: Annotated[int, Field(ge=100)] = 2000
    action: Action = "block"


class StrataRule(Section):
    """A bound for each group of some columns of the cohort, such as site or scanner."""

    columns: Annotated[tuple[str, ...], Field(min_length=1)]
    measure: str
    bound: float
    """The least value; of mae, the greatest."""
    task: str | None = None
    """null: the first one."""
    least: Positive = 10
    """Patients below which a group is too small to judge; so is one whose labels cannot give the measure."""
    few: Literal["pass", "hold"] = "pass"
    """What groups that are too small to judge do; they are named in any case."""
    action: Action = "block"


class CalibrationRule(Section):
    """Probabilities must mean what they say: expected calibration error, in ten bins, mean over classes."""

    most: Annotated[float, Field(gt=0, lt=1)] = 0.15
    task: str | None = None
    """null: the first one; one of classes or labels."""
    action: Action = "block"


class ResourcesRule(Section):
    """What the prediction of one slide may take, measured while the frozen test is predicted."""

    seconds: Annotated[float, Field(gt=0)] | None = None
    """Wall time of one slide, mean."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Most that the predicting process held: of the GPU, or the resident set where it computes on a CPU."""
    action: Action = "block"

    @model_validator(mode="after")
    def _any(self) -> Self:
        if self.seconds is None and self.memory_gib is None:
            raise ValueError("limits nothing; set seconds or memory_gib")
        return self


class DriftRule(Section):
    """New slides that look unlike those the champion learned from: two-sample tests, adjusted for being many (Holm)."""

    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.01
    effect: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Least effect that counts, beside p below alpha: Cliff's delta, Cramer's V or the like, 0 to 1 (`release.drift`).
    With many slides every difference is significant."""
    least: Positive = 8
    """New slides below which nothing is tested."""
    action: Action = "hold"


class LostRule(Section):
    """Budgets for what could not be read."""

    patches: Fraction = 0.02
    """Share of all patches that could not be decoded."""
    slides: Fraction = 0.05
    """Share of the cohort's slides that are quarantined."""
    action: Action = "hold"


class GateConfig(Section):
    """What a candidate must show before it replaces the champion. Every rule that is set must be met."""

    floors: tuple[FloorRule, ...] = ()
    no_worse: NoWorseRule | None = None
    strata: tuple[StrataRule, ...] = ()
    calibration: CalibrationRule | None = None
    resources: ResourcesRule | None = None
    drift: DriftRule | None = None
    lost: LostRule | None = None
    approval: bool = False
    """A person must approve, whatever the rules say (`promote --approve`)."""
    first: Literal["hold", "floors"] = "hold"
    """The first model, which has no champion to be compared with. floors: it is judged by the rules that need none.
    hold: it waits for a person."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = (self.floors, self.no_worse, self.strata, self.calibration, self.resources, self.drift, self.lost)
        if not any(rules) and not self.approval:
            raise ValueError(
                "no rule is set, and no model is promoted unseen; set gate.no_worse={margin: 0.02}, "
                "gate.floors=[{measure: auc, bound: 0.8}] or gate.approval=true"
            )
        if self.first == "floors" and not self.floors:
            raise ValueError("first=floors without floors would promote the first model unseen; set floors")
        return self


class RetrainConfig(Section):
    """How `retrain` trains. What it trains on is in the other sections."""

    start: Literal["cold", "warm"] = "cold"
    """cold: as `run` does. warm: from the champion's weights."""
    replay: Fraction = 1.0
    """warm: share of the slides that the champion has learned from which are trained on again, beside all new ones."""
    epochs: Positive | None = None
    """warm: in place of train.epochs. null: that."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """warm: in place of train.lr. null: that."""
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    """warm: in place of train.warmup_epochs. null: that."""
    new_patients: Literal["drawn", "train"] = "drawn"
    """Where patients go who come after the splits were recorded, when the cohort has no split column. drawn: by the
    shares, as the first ones; those of test are kept for the next version of the frozen test. train: none into test;
    its share goes to train."""
    refresh_test: Annotated[int, Field(ge=0)] = 0
    """How often the frozen test was drawn up anew on purpose. One more, and the next retraining freezes the test
    patients of that day as a new version of the manifest, on which the champion is scored again too."""
    expect_new_within: str | None = None
    """Longest time without a new slide, as in 8d; past it `retrain` ends with exit code 6. null: never."""

    @field_validator("expect_new_within")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None:
            seconds(value)
        return value

    @property
    def expected_s(self) -> float | None:
        """`expect_new_within` in seconds."""
        return None if self.expect_new_within is None else seconds(self.expect_new_within)


class NotifyConfig(Section):
    """Who is told how a retraining ended (execution)."""

    url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """Gets one POST of the JSON that `retrain --json` prints, tried several times; signed with IPS_NOTIFY_SECRET where
    the environment has that (`release.notify`)."""
