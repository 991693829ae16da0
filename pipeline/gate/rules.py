"""The rules of the gate: each says of the evidence whether it is met, by which figures."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from pipeline.cohort.labels import truth
from pipeline.config.data import TaskConfig
from pipeline.config.release import (
    Action,
    CalibrationRule,
    DriftRule,
    FloorRule,
    GateConfig,
    LostRule,
    NoWorseRule,
    ResourcesRule,
    StrataRule,
)
from pipeline.errors import StageError
from pipeline.gate.evidence import Evidence, Predictions
from pipeline.gate.no_worse import LESS, bounds
from pipeline.inference.metrics import MEASURES, Floats, Ints, measure
from pipeline.inference.scores import calibrations

_DIGITS = 9  # of a figure: libraries of another build may round the last ones differently

Met = Literal["met", "not met", "too few"]


@dataclass(frozen=True)
class Outcome:
    """What one rule says."""

    rule: str
    outcome: Met
    action: Action | Literal["pass"]
    """What it does where it is not met, or cannot be judged by so few."""
    figures: Mapping[str, float | None]
    says: str
    """In a sentence."""


@dataclass(frozen=True)
class Judged:
    """The evidence with its arrays."""

    evidence: Evidence

    @cached_property
    def tasks(self) -> dict[str, TaskConfig]:
        """By name."""
        return {str(task["name"]): TaskConfig.model_validate(task) for task in self.evidence.tasks}

    def task(self, name: str | None) -> TaskConfig:
        """The named task, or the first one."""
        return next(iter(self.tasks.values())) if name is None else self.tasks[name]

    def truth(self, task: TaskConfig) -> Floats:
        """(n,) or (n, W)."""
        return np.array([truth(task, slide.labels[task.name]) for slide in self.evidence.slides])

    def values(self, task: TaskConfig, of: Predictions) -> Floats:
        """(n, K)."""
        return np.array(of.values[task.name], np.float64)

    def measure(self, task: TaskConfig, name: str, of: Predictions, rows: Ints | None = None) -> float:
        """One measure over some slides, or all."""
        chosen = np.arange(len(self.evidence.slides)) if rows is None else rows
        found = measure(task, self.values(task, of)[chosen], self.truth(task)[chosen])
        return found[MEASURES[task.kind].index(name)]

    def patients(self, rows: Sequence[int] | None = None) -> int:
        """How many there are in some slides, or all."""
        slides = self.evidence.slides
        chosen = range(len(slides)) if rows is None else rows
        return len({slides[row].patient for row in chosen})


def problems(gate: GateConfig, tasks: Sequence[TaskConfig], columns: Collection[str]) -> list[str]:
    """What of the rules does not go with the tasks, or with the cohort's columns beside, for a ConfigError."""
    kinds = {task.name: task for task in tasks}
    rules: list[tuple[str, FloorRule | NoWorseRule | StrataRule | CalibrationRule]] = []
    rules += [(f"gate.floors.{place}", rule) for place, rule in enumerate(gate.floors)]
    rules += [(f"gate.strata.{place}", rule) for place, rule in enumerate(gate.strata)]
    rules += [("gate.no_worse", gate.no_worse)] if gate.no_worse else []
    rules += [("gate.calibration", gate.calibration)] if gate.calibration else []
    found = [
        f"gate.strata.{place}.columns: the cohort has no column {name!r}; it has {', '.join(sorted(columns)) or 'none'}"
        for place, rule in enumerate(gate.strata)
        for name in rule.columns
        if name not in columns
    ]
    for place, rule in rules:
        if rule.task is not None and rule.task not in kinds:
            found.append(f"{place}.task: there is no task {rule.task!r}; it is one of {', '.join(kinds)}")
            continue
        task = tasks[0] if rule.task is None else kinds[rule.task]
        if isinstance(rule, CalibrationRule):
            if task.kind in ("regression", "survival"):
                found.append(f"{place}: a {task.kind} task has no probabilities of classes; name another task")
        elif rule.measure is not None and rule.measure not in MEASURES[task.kind]:
            known = ", ".join(MEASURES[task.kind])
            found.append(f"{place}.measure: task {task.name} has no {rule.measure!r}; it has {known}")
    return found


def outcomes(gate: GateConfig, judged: Judged) -> Iterator[Outcome]:
    """Of every rule that is set, in a fixed order; of those that need a champion, where there is one to compare."""
    evidence = judged.evidence
    yield from (_floor(rule, judged) for rule in gate.floors)
    if gate.no_worse is not None and evidence.champion is not None:
        yield _no_worse(gate.no_worse, judged, evidence.champion)
    for rule in gate.strata:
        yield from _strata(rule, judged)
    if gate.calibration is not None:
        yield _calibration(gate.calibration, judged)
    if gate.resources is not None:
        yield from _resources(gate.resources, evidence.candidate)
    if gate.drift is not None and evidence.drift is not None:
        yield _drift(gate.drift, evidence)
    if gate.lost is not None:
        yield from _lost(gate.lost, evidence.lost)


def _figures(**values: float) -> dict[str, float | None]:
    return {name: figure(value) for name, value in values.items()}


def figure(value: float) -> float | None:
    """A number to nine digits; None where it is not defined."""
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None


def _reaches(name: str, value: float, bound: float) -> bool:
    return bool(value <= bound) if name in LESS else bool(value >= bound)


def _floor(rule: FloorRule, judged: Judged) -> Outcome:
    task = judged.task(rule.task)
    slides = judged.evidence.slides
    patients = judged.patients([row for row, slide in enumerate(slides) if slide.labels[task.name] is not None])
    if patients < rule.least:
        says = f"{patients} patients with a label of {task.name} are too few to judge by; at least {rule.least} are"
        figures = _figures(patients=patients, least=rule.least)
        return Outcome(f"floor {task.name} {rule.measure}", "too few", "hold", figures, says)
    value = judged.measure(task, rule.measure, judged.evidence.candidate)
    met: Met = "met" if _reaches(rule.measure, value, rule.bound) else "not met"
    side = "at most" if rule.measure in LESS else "at least"
    says = f"{rule.measure} of {task.name} is {value:.4f}, asked is {side} {rule.bound:g}"
    name = f"floor {task.name} {rule.measure}"
    return Outcome(name, met, rule.action, _figures(value=value, bound=rule.bound), says)


def _no_worse(rule: NoWorseRule, judged: Judged, champion: Predictions) -> Outcome:
    """Non-inferiority of paired predictions (`gate.no_worse`)."""
    evidence, task = judged.evidence, judged.task(rule.task)
    name = rule.measure or MEASURES[task.kind][0]
    both = (evidence.candidate, champion)
    labels = [slide.labels[task.name] for slide in evidence.slides]
    known = np.array([row for row, label in enumerate(labels) if label is not None], np.int64)
    title, patients = f"no worse {task.name} {name}", judged.patients(known.tolist())
    if patients < rule.least or np.isnan([judged.measure(task, name, of) for of in both]).any():
        says = f"{patients} patients with a label of {task.name} are too few to judge by; at least {rule.least} are"
        return Outcome(title, "too few", "hold", _figures(patients=patients, least=rule.least), says)
    try:
        found = bounds(
            task,
            name,
            (judged.values(task, both[0])[known], judged.values(task, both[1])[known]),
            judged.truth(task)[known],
            [labels[row] for row in known],
            [evidence.slides[row].patient for row in known],
            margin=rule.margin,
            level=rule.level,
            resamples=rule.resamples,
            seed=evidence.seed,
        )
    except StageError as error:
        return Outcome(title, "too few", "hold", _figures(patients=patients), str(error))
    met: Met = "not met" if found.shown <= -rule.margin else "met" if found.low > -rule.margin else "too few"
    better = ", counted so that more is better," if name in LESS else ""
    says = (
        f"the difference to the champion{better} in {name} of {task.name} is {found.value:+.4f}, and not below "
        f"{found.shown:+.4f} at {rule.level:.0%}; the margin is {-rule.margin:+g}"
    )
    if met == "too few":
        of = " of the rarer class" if name == "auc" else ""
        says += (
            f"; but {found.trials} patients{of} are too few to judge by: a loss that sits in few of them, as in a rare "
            f"kind of tumour, may not show; with {found.needed} it would"
        )
    figures = _figures(
        difference=found.value,
        shown=found.shown,
        low=found.low,
        margin=rule.margin,
        patients=patients,
        trials=found.trials,
        needed=found.needed,
    )
    return Outcome(title, met, "hold" if met == "too few" else rule.action, figures, says)


def _strata(rule: StrataRule, judged: Judged) -> Iterator[Outcome]:
    """A group of too few patients, or without what the measure needs, is said to be that."""
    task, slides = judged.task(rule.task), judged.evidence.slides
    for column in rule.columns:
        for value in sorted({slide.groups.get(column, "") for slide in slides}):
            rows = [n for n, slide in enumerate(slides) if slide.groups.get(column, "") == value]
            patients = judged.patients(rows)
            found = judged.measure(task, rule.measure, judged.evidence.candidate, np.array(rows, np.int64))
            title = f"stratum {column}={value or '(empty)'} {task.name} {rule.measure}"
            figures = _figures(value=found, bound=rule.bound, patients=patients, least=rule.least)
            if patients < rule.least or np.isnan(found):
                says = f"{column} {value or '(empty)'}: {patients} patients are too few to judge by"
                says += f"; at least {rule.least} are" if patients < rule.least else f": they give no {rule.measure}"
                yield Outcome(title, "too few", rule.few, figures, says)
                continue
            met: Met = "met" if _reaches(rule.measure, found, rule.bound) else "not met"
            says = f"{column} {value}: {rule.measure} of {task.name} is {found:.4f}, the bound is {rule.bound:g}"
            yield Outcome(title, met, rule.action, figures, says)


def _calibration(rule: CalibrationRule, judged: Judged) -> Outcome:
    task = judged.task(rule.task)
    values, true = judged.values(task, judged.evidence.candidate), judged.truth(task)
    error = float(np.mean([found.error for found in calibrations(task, values, true).values()]))
    met: Met = "met" if error <= rule.most else "not met"
    says = f"the calibration error of {task.name} is {error:.4f}, asked is at most {rule.most:g}"
    return Outcome(f"calibration {task.name}", met, rule.action, _figures(value=error, bound=rule.most), says)


def _resources(rule: ResourcesRule, candidate: Predictions) -> Iterator[Outcome]:
    pairs = (("seconds", candidate.seconds, rule.seconds), ("memory", candidate.memory_gib, rule.memory_gib))
    for name, value, bound in pairs:
        if bound is not None:
            unit = "s a slide" if name == "seconds" else "GiB"
            met: Met = "met" if value <= bound else "not met"
            says = f"{name}: {value:.3g} {unit}, asked is at most {bound:g}"
            yield Outcome(f"resources {name}", met, rule.action, _figures(value=value, bound=bound), says)


def _drift(rule: DriftRule, evidence: Evidence) -> Outcome:
    findings = evidence.drift or ()
    tested = [one for one in findings if one.n_new >= rule.least]
    if not tested:
        most = max((one.n_new for one in findings), default=0)
        says = f"{most} new slides are too few to look for drift; at least {rule.least} are"
        return Outcome("drift", "too few", "pass", _figures(new=most, least=rule.least), says)
    drifted = [one for one in tested if one.p < rule.alpha and one.effect >= rule.effect]
    figures = {f"{one.name} {what}": figure(v) for one in drifted for what, v in (("p", one.p), ("effect", one.effect))}
    if not drifted:
        return Outcome("drift", "met", rule.action, figures, f"none of {len(tested)} respects has drifted")
    told = ", ".join(f"{one.name} (effect {one.effect:.2f}, p {one.p:.2g})" for one in drifted)
    return Outcome("drift", "not met", rule.action, figures, f"new slides are unlike those of before: {told}")


def _lost(rule: LostRule, lost: Mapping[str, float]) -> Iterator[Outcome]:
    for name, bound in (("patches", rule.patches), ("slides", rule.slides)):
        value = lost[name]
        met: Met = "met" if value <= bound else "not met"
        says = f"{value:.2%} of the {name} could not be read, {bound:.2%} may be lost"
        yield Outcome(f"lost {name}", met, rule.action, _figures(value=value, bound=bound), says)
