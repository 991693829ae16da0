"""Two pages for people: why a model was promoted, held or rejected; and how new slides differ from those of before."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from pipeline.gate.evidence import Finding
from pipeline.inference.metrics import Bools, Floats
from pipeline.pages import render_page
from pipeline.release.drift import NUMBERS, Sides, unusual
from pipeline.release.history import Act

BINS = 24
SHOWN = 60  # new slides in the table; the most unusual ones
PICTURES = 24  # of those, with a thumbnail
WIDTH, HEIGHT = 240, 64  # of a small multiple, px
_DOES = ("block", "hold", "pass")


def gate_page(
    name: str,
    decision: Mapping[str, Any],
    digest: str,
    diff: Mapping[str, Any],
    acts: Sequence[Act],
    beside: Sequence[str] = (),
) -> str:
    """The decision: its verdict, every rule, what both models measure, what came, and the acts before it.

    Args:
        name: of the model.
        decision: what the gate said.
        digest: of it.
        diff: `counts` of what changed in the cohort, and `slides` by kind, by their ids.
        acts: all of before, the first one first.
        beside: names of the other pages in its folder.
    """
    measures = [
        {"task": task, "name": measure, "candidate": value, "champion": _of_champion(decision, task, measure)}
        for task, found in decision["candidate"]["measures"].items()
        for measure, value in found.items()
    ]
    rules = sorted(decision["rules"], key=_urgency)  # stable: those of one outcome stay in the gate's order
    return _render(
        "gate.html",
        name=name,
        decision=decision,
        digest=digest,
        measures=measures,
        rules=rules,
        stopped={
            does: [rule for rule in rules if rule["outcome"] != "met" and rule["action"] == does] for does in _DOES
        },
        diff=diff,
        acts=list(acts)[::-1],
        beside=beside,
    )


def _urgency(rule: Mapping[str, Any]) -> tuple[int, int]:
    return ("not met", "too few", "met").index(rule["outcome"]), _DOES.index(rule["action"])


def _of_champion(decision: Mapping[str, Any], task: str, measure: str) -> float | None:
    champion = decision["champion"]
    return None if champion is None else champion["measures"].get(task, {}).get(measure)


def drift_page(name: str, sides: Sides, findings: Sequence[Finding], rule: Mapping[str, Any] | None) -> str:
    """New slides beside those of before: tests, small multiples, and the most unusual slides first.

    Args:
        name: of the model.
        sides: all slides.
        findings: `find_drift` of them.
        rule: `gate.drift`, or None where it holds nothing.
    """
    found = sorted(zip(unusual(sides), sides.slides[: sides.new], strict=True), key=lambda one: -one[0][0])
    rows = [
        {
            "slide": slide,
            "by": by,
            "distance": distance,
            "picture": base64.b64encode(slide.thumbnail).decode() if place < PICTURES else None,
        }
        for place, ((distance, by), slide) in enumerate(found[:SHOWN])
    ]
    numbers = [
        {
            "name": known,
            "says": says,
            "chart": _chart(np.array([one.numbers[known] for one in sides.slides]), sides.is_new),
        }
        for known, says in NUMBERS.items()
    ]
    return _render(
        "drift.html",
        name=name,
        findings=findings,
        rule=rule,
        new=sides.new,
        old=len(sides.slides) - sides.new,
        rows=rows,
        more=max(0, sides.new - SHOWN),
        charts=[one for one in numbers if one["chart"] is not None],
        columns=tuple(NUMBERS),
        width=WIDTH,
        height=HEIGHT,
    )


def _chart(values: Floats, new: Bools) -> dict[str, Any] | None:
    """Two histograms on one scale, as shares of each side; None where a side knows no value."""
    known = ~np.isnan(values)
    sides = [values[known & new], values[known & ~new]]
    if not all(map(len, sides)):
        return None
    low, high = float(values[known].min()), float(values[known].max())
    ends = (low, high) if high > low else (low - 0.5, high + 0.5)
    counts = [np.histogram(side, bins=BINS, range=ends)[0] / len(side) for side in sides]
    top = max(float(count.max()) for count in counts)
    step = WIDTH / BINS
    bars = [
        [(round(n * step, 1), round(share / top * HEIGHT, 1), round(step - 1, 1)) for n, share in enumerate(count)]
        for count in counts
    ]
    return {"low": low, "high": high, "new": bars[0], "old": bars[1]}


def _render(template: str, **values: Any) -> str:
    return render_page(f"release/{template}", {"digits": _digits, "commands": _commands}, **values)


def _commands(text: str) -> Markup:
    """What stands between backticks, as something to type."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _digits(value: float | None) -> str:
    return "\N{EN DASH}" if value is None or np.isnan(value) else f"{value:.4g}"
