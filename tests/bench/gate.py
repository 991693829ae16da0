"""How often the gate lets a worse model through: `python -m tests.bench.gate`; 4 minutes.

Two models on one test of n patients, of which a share is positive. The candidate is worse by just the margin, so a rule
at 95% may promote it in 5 of 100 tests; and, for what care costs, it is as good, when it should be promoted. Bounds:

- before: percentiles of paired resamples, with the floor for two models that never differ.
- shown: the lower one of percentiles and DeLong.
- now: also where the loss sits in few patients (`pipeline.gate.no_worse`).

Kinds of difference: `even`, scores of two normal distributions whose models agree to some degree, of which one has the
smaller AUC; `rare`, a candidate that agrees with the champion but sees nothing in a share of the positive patients.

Exit code 1 when `now` promotes a worse model in more than 8 of 100 tests (5, and what 400 tests may add by chance).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from pipeline.config.data import TaskConfig
from pipeline.gate.no_worse import bounds
from pipeline.inference.intervals import floor
from pipeline.inference.metrics import Floats, measure
from pipeline.inference.resampling import draw_plan, paired_difference
from pipeline.inference.weighted import resampled_measures

TASK = TaskConfig(name="tumour", column="label", classes=("no", "yes"))
LEVEL, RESAMPLES, TESTS, MOST = 0.95, 300, 400, 0.08
WAYS = ("before", "shown", "now")


@dataclass(frozen=True)
class Setting:
    """How the two models differ."""

    kind: str
    area: float
    """AUC of the champion."""
    margin: float
    agree: float
    """Correlation of the two models' scores, within a class."""


SETTINGS = (
    Setting("even", 0.85, 0.05, 0.5),
    Setting("even", 0.90, 0.02, 0.9),
    Setting("even", 0.97, 0.02, 0.7),
    Setting("even", 0.98, 0.05, 0.5),
    Setting("rare", 0.95, 0.02, 1.0),
    Setting("rare", 0.95, 0.05, 1.0),
)
SIZES = ((50, 0.2), (50, 0.5), (100, 0.2), (100, 0.5), (200, 0.2), (200, 0.5), (400, 0.5))


def main() -> int:
    """Simulate, print, compare."""
    rows = []
    print(
        "n, positive, kind, AUC, margin, agree: worse by the margin " + " ".join(WAYS) + " | as good " + " ".join(WAYS)
    )
    for n, share in SIZES:
        for setting in SETTINGS:
            worse, good = (promoted(n, share, setting, of) for of in (1.0, 0.0))
            rows.append({"n": n, "positive": share, **vars(setting), "worse": worse, "as_good": good})
            told = " ".join(f"{100 * worse[way]:6.1f}" for way in WAYS)
            told += "  |" + " ".join(f"{100 * good[way]:6.1f}" for way in WAYS)
            print(
                f"{n:3d} {share:.0%} {setting.kind} {setting.area} {setting.margin} {setting.agree}  {told}", flush=True
            )
    print(json.dumps(rows))
    highest = max(row["worse"]["now"] for row in rows)
    print(f"most that a worse model is promoted: {highest:.1%}")
    return int(highest > MOST)


def promoted(n: int, share: float, setting: Setting, loss: float) -> dict[str, float]:
    """Share of tests in which each bound promotes a candidate that is worse by `loss` margins."""
    generator, found = np.random.default_rng([n, round(100 * share)]), Counter[str]()
    positive = (np.arange(n) < round(n * share)).astype(np.float64)
    tests = TESTS if loss else TESTS // 4
    for _ in range(tests):
        for way, low in lows(*scores(generator, positive, setting, loss * setting.margin), positive, setting).items():
            found[way] += low > -setting.margin
    return {way: found[way] / tests for way in WAYS}


def scores(generator: np.random.Generator, positive: Floats, setting: Setting, loss: float) -> tuple[Floats, Floats]:
    """(n,) of the candidate and of the champion."""
    alike, own, others = generator.standard_normal((3, len(positive)))
    apart = np.sqrt(2) * norm.ppf([setting.area - loss, setting.area])
    if setting.kind == "rare":
        champion = others + apart[1] * positive
        blind = (positive == 1) & (generator.random(len(positive)) < loss / setting.area)
        return np.where(blind, -9.0, champion + 0.05 * own), champion
    both = np.sqrt(setting.agree) * alike
    rest = np.sqrt(1 - setting.agree)
    return both + rest * own + apart[0] * positive, both + rest * others + apart[1] * positive


def lows(candidate: Floats, champion: Floats, positive: Floats, setting: Setting) -> dict[str, float]:
    """What the difference is not below, by each bound; every slide is a patient."""
    values = tuple(np.stack([-each, each], axis=1) for each in (candidate, champion))
    patients = [str(number) for number in range(len(positive))]
    labels = [TASK.classes[int(one)] for one in positive]
    found = bounds(
        TASK, "auc", (values[0], values[1]), positive, labels, patients,
        margin=setting.margin, level=LEVEL, resamples=RESAMPLES, seed=0,
    )  # fmt: skip
    weights = draw_plan(patients, [int(one) for one in positive], RESAMPLES, 0).weights(patients)
    first, second = (resampled_measures(TASK, each, positive, weights)[:, 0] for each in values)
    measured = [measure(TASK, each, positive)[0] for each in values]
    before = paired_difference((measured[0], measured[1]), (first, second), alpha=2 * (1 - LEVEL)).low
    if (first == second).all():
        before -= 1 - (floor(TASK, "auc", positive, patients) or 1.0)
    return {"before": before, "shown": found.shown, "now": found.low}


if __name__ == "__main__":
    sys.exit(main())
