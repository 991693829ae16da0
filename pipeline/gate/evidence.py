"""All that a decision rests on, as plain data: what the gate reads, and nothing else.

It is kept beside the decision, so that anyone may take the same decision again. Slides and patients are named by the
digests of their ids.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipeline.cohort.labels import Label
from pipeline.errors import StageError


@dataclass(frozen=True)
class TestSlide:
    """One slide that both models predicted."""

    __test__ = False  # no test of pytest's

    slide: str
    patient: str
    labels: Mapping[str, Label | None]
    """Task -> label, frozen."""
    groups: Mapping[str, str]
    """Column -> value, of the cohort as it is."""


@dataclass(frozen=True)
class Predictions:
    """What one model says of these slides."""

    version: str
    """In the registry."""
    train: str
    """Fingerprint of its training."""
    values: Mapping[str, tuple[tuple[float, ...], ...]]
    """Task -> a row a slide, with a number for each of the task's outputs."""
    seconds: float
    """Of one slide, mean."""
    memory_gib: float
    """Most that was held."""
    seen: tuple[str, ...] | None
    """Test slides that it has learned from; None where what it learned from is not known."""


@dataclass(frozen=True)
class Finding:
    """New slides against those that the champion learned from, in one respect."""

    name: str
    n_new: int
    n_old: int
    p: float
    """Adjusted for how many respects were looked at (Holm)."""
    effect: float
    """0: no difference, 1: no overlap."""


@dataclass(frozen=True)
class Evidence:
    """What the gate decides by."""

    manifest: Mapping[str, Any]
    """`version`, `digest`, and how many cases the cohort has no more (`missing`), has other labels for (`relabelled`)
    or other files (`rescanned`) or ids (`renamed`)."""
    tasks: tuple[Mapping[str, Any], ...]
    """Of the config."""
    slides: tuple[TestSlide, ...]
    candidate: Predictions
    champion: Predictions | None
    """None where there is none, or it cannot be scored."""
    names_champion: str | None
    """Its version in the registry, None where there is none."""
    unscorable: str | None
    """Why the champion cannot be scored any more."""
    taken_back: str | None
    """Who took the candidate back when it was champion, when and why; None where nobody did."""
    drift: tuple[Finding, ...] | None
    """None where no drift was looked for."""
    lost: Mapping[str, float]
    """Shares of `patches` and `slides` that could not be read."""
    gate: Mapping[str, Any]
    """The rules, as configured."""
    seed: int
    force: str | None
    """Why a person wants the model promoted although it would be held."""
    software: Mapping[str, str]
    """Versions of what decides: another one may draw other resamples of the same seed."""

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        plain: dict[str, Any] = json.loads(canonical(asdict(self)))
        return plain

    @property
    def digest(self) -> str:
        """sha256 (hex) of its canonical JSON."""
        return hashlib.sha256(canonical(asdict(self))).hexdigest()


def parse(plain: Mapping[str, Any]) -> Evidence:
    """Evidence from its JSON.

    Raises:
        StageError: it is of a release that knew other fields.
    """
    if others := {field.name for field in fields(Evidence)} ^ plain.keys():
        raise StageError(
            f"the evidence has other fields ({', '.join(sorted(others))}) than this release reads; take it again "
            f"with the one that took it: {dict(plain.get('software', {}))}"
        )
    drift, champion = plain["drift"], plain["champion"]
    return Evidence(
        **{
            **plain,
            "tasks": tuple(plain["tasks"]),
            "slides": tuple(TestSlide(**slide) for slide in plain["slides"]),
            "candidate": _predictions(plain["candidate"]),
            "champion": None if champion is None else _predictions(champion),
            "drift": None if drift is None else tuple(Finding(**finding) for finding in drift),
        }
    )


def _predictions(plain: Mapping[str, Any]) -> Predictions:
    values = {task: tuple(tuple(row) for row in rows) for task, rows in plain["values"].items()}
    seen = plain["seen"]
    return Predictions(**{**plain, "values": values, "seen": None if seen is None else tuple(seen)})


def canonical(value: object) -> bytes:
    """JSON of which equal values have equal bytes: sorted, without spaces; NaN and infinity are null."""
    return json.dumps(_finite(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
