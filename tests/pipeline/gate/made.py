"""Evidence for the tests of the gate: two models of known scores on one small test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.config.data import TaskConfig
from pipeline.config.release import GateConfig
from pipeline.gate.decision import software
from pipeline.gate.evidence import Evidence, Finding, Predictions, TestSlide

TASK = TaskConfig(name="tumour", column="label", classes=("no", "yes"))
SLIDES = 47


def predictions(version: str, scores: Sequence[float], **changes: Any) -> Predictions:
    """Of a model that gives these scores to the positive class."""
    values = {TASK.name: tuple((1 - score, score) for score in scores)}
    return replace(Predictions(version, f"train{version}", values, 0.5, 1.5, ()), **changes)


def scores(noise: float, seed: int = 0) -> list[float]:
    """One a slide: .7 for positive slides and .3 for others, blurred."""
    generator = np.random.default_rng(seed)
    middle = np.where(np.arange(SLIDES) % 3 == 0, 0.7, 0.3)
    return np.clip(middle + noise * generator.standard_normal(SLIDES), 0.01, 0.99).tolist()  # type: ignore[no-any-return]


def evidence(gate: GateConfig, **changes: Any) -> Evidence:
    """Version 2 against version 1, both good, on 47 slides of 31 patients, of which every third is positive."""
    slides = [
        TestSlide(
            f"s{n}", f"p{n % 31}", {"tumour": "yes" if n % 3 == 0 else "no"}, {"site": "small" if n < 7 else "big"}
        )
        for n in range(SLIDES)
    ]
    whole = Evidence(
        manifest={"version": 1, "digest": "m", "slides": SLIDES, "patients": 31, "missing": 0, "relabelled": 0,
                  "rescanned": 0, "renamed": 0},
        tasks=(TASK.model_dump(mode="json"),),
        slides=tuple(slides),
        candidate=predictions("2", scores(0.15)),
        champion=predictions("1", scores(0.15)),
        names_champion="1",
        unscorable=None,
        taken_back=None,
        drift=None,
        lost={"patches": 0.001, "slides": 0.0},
        gate=gate.model_dump(mode="json"),
        seed=0,
        force=None,
        software=software(),
    )  # fmt: skip
    return replace(whole, **changes)


def finding(name: str, p: float, effect: float, n_new: int = 20) -> Finding:
    """Of drift."""
    return Finding(name, n_new, 100, p, effect)
