"""A sweep as one HTML page that needs nothing else but the pictures beside it: no scripts, no fonts, no network."""

from __future__ import annotations

import base64
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.config.data import TaskConfig
from pipeline.config.recipe import Config
from pipeline.inference.figures import reliability_png
from pipeline.inference.metrics import MEASURES
from pipeline.inference.scores import title
from pipeline.pages import render_page
from pipeline.results.strata import Stratum
from pipeline.sweep.charts import Point, against_png, ranking_png
from pipeline.sweep.statistics import CellResult, CohortResult, Pair, most_wrong

WORST = 12
"""Slides that are listed as the most often wrong."""
CURVES = 6
"""Cells whose calibration is drawn: the best ones."""
_MOST_PAIRS = 12  # cells of a matrix; of more, the best


def sweep_page(
    config: Config,
    results: Sequence[CohortResult],
    failed: Mapping[str, str],
    left_out: Sequence[str],
    overlays: Mapping[tuple[str, str], str],
) -> str:
    """The page.

    Args:
        config: of the sweep.
        results: of each cohort.
        failed: model -> why it could not be had.
        left_out: combinations that have no cell, and why.
        overlays: (cohort, slide) -> the place of its heatmap, from the page's.
    """
    sweep = config.sweep
    assert sweep is not None
    return render_page(
        "sweep/page.html",
        {"digits": _digits, "p": _p, "title": title},
        name=config.name,
        sweep=sweep,
        cohorts=[_cohort(one, overlays) for one in results],
        failed=failed,
        left_out=left_out,
        config=json.dumps(sweep.model_dump(mode="json"), indent=2),
    )


def _cohort(one: CohortResult, overlays: Mapping[tuple[str, str], str]) -> dict[str, object]:
    tasks: dict[str, TaskConfig] = {result.task.name: result.task for result in one.results}
    shared = int(one.shared.sum())
    reasons = [
        {
            "cell": rows.cell.scoring.name,
            "missing": [
                (slide.slide_id, reason)
                for slide, reason in zip(one.cohort.slides, rows.reasons, strict=True)
                if reason is not None
            ],
        }
        for rows in dict.fromkeys(result.rows for result in one.results)
    ]
    return {
        "name": one.cohort.name,
        "uri": one.cohort.uri,
        "slides": len(one.cohort.slides),
        "patients": len(set(one.cohort.patients)),
        "shared": shared,
        "missing": [reason for reason in reasons if reason["missing"]],
        "without": [rows.cell.scoring.name for rows in one.without],
        "plan": one.plan,
        "tasks": [_task(one, task, number, overlays) for number, task in enumerate(tasks.values())],
    }


def _task(
    one: CohortResult, task: TaskConfig, number: int, overlays: Mapping[tuple[str, str], str]
) -> dict[str, object]:
    results = [result for result in one.results if result.task is task or result.task.name == task.name]
    pairs = [pair for pair in one.pairs if pair.first.task.name == task.name]
    headline = MEASURES[task.kind][0]
    extra = dict.fromkeys(name for result in results for name in result.found.scores if name not in MEASURES[task.kind])
    wrong = most_wrong([result.rows for result in results], task, number)[:WORST]
    return {
        "name": task.name,
        "headline": title(headline),
        "measures": MEASURES[task.kind],
        "results": results,
        "ranking": _png(ranking_png(_points(results), title(headline))),
        "cost": _png(against_png(_costs(results), "seconds a slide", title(headline), joined=False)),
        "memory": _memory(results, pairs, title(headline)),
        "extra": list(extra),
        "pairs": _matrix(results, pairs),
        "hidden": max(0, len(results) - _MOST_PAIRS),
        "strata": _strata(results, headline),
        "calibration": _calibration(one, results),
        "wrong": [
            {
                "slide": one.cohort.slides[place],
                "label": one.cohort.slides[place].labels[task.name],
                "wrong": count,
                "judged": judged,
                "overlay": overlays.get((one.cohort.name, one.cohort.slides[place].slide_id)),
            }
            for place, count, judged in wrong
        ],
    }


def _points(results: Sequence[CellResult]) -> list[Point]:
    return [Point(r.rows.cell.scoring.name, r.rows.cell.scoring.model.name, 0.0, r.headline) for r in results]


def _costs(results: Sequence[CellResult]) -> list[Point]:
    """Its own seconds and those of reading, which the models of a pass shared."""
    return [
        replace(point, x=max(1e-3, result.rows.costs["seconds_a_slide"] + result.rows.costs["read_seconds_a_slide"]))
        for point, result in zip(_points(results), results, strict=True)
    ]


def _memory(results: Sequence[CellResult], pairs: Sequence[Pair], title: str) -> dict[str, object] | None:
    """Accuracy against M, of models that were tested at several; the flat point is marked."""
    groups: defaultdict[str, list[CellResult]] = defaultdict(list)
    for result in results:
        scoring = result.rows.cell.scoring
        if scoring.setting.memory is not None:
            rest = replace(scoring.setting, memory=None).text
            groups[f"{scoring.model.name} ({rest})"].append(result)
    several = {name: own for name, own in groups.items() if len({r.rows.cell.scoring.setting.memory for r in own}) > 1}
    if not several:
        return None
    points, flat = [], []
    for name, own in several.items():
        least = flat_point(own, pairs)
        for result in own:
            memory = result.rows.cell.scoring.setting.memory
            assert memory is not None
            points.append(Point(name, name, float(memory), result.headline, result is least))
        if least is not None:
            flat.append((name, least.rows.cell.scoring.setting.memory))
    return {"chart": _png(against_png(points, "M, patches kept", title, joined=True)), "flat": flat}


def flat_point(results: Sequence[CellResult], pairs: Sequence[Pair]) -> CellResult | None:
    """Of cells that differ in M: the smallest M that the best one is not shown to be better than (95%, unadjusted)."""
    known = [result for result in results if not math.isnan(result.headline.value)]
    if not known:
        return None
    best = max(known, key=lambda result: result.headline.value)
    better = {
        id(pair.second if pair.first is best else pair.first): pair.difference.low
        if pair.first is best
        else -pair.difference.high
        for pair in pairs
        if pair.first is best or pair.second is best
    }
    level = [result for result in known if result is best or better.get(id(result), 0.0) <= 0]
    return min(level, key=lambda result: result.rows.cell.scoring.setting.memory or 0)


def _matrix(results: Sequence[CellResult], pairs: Sequence[Pair]) -> dict[str, object]:
    """Row minus column, of the best cells."""
    shown = results[:_MOST_PAIRS]
    found = {(id(pair.first), id(pair.second)): pair for pair in pairs}
    rows = []
    for a in shown:
        cells: list[dict[str, object] | None] = []
        for b in shown:
            pair, sign = found.get((id(a), id(b))), 1.0
            if pair is None:
                pair, sign = found.get((id(b), id(a))), -1.0
            cells.append(None if pair is None or a is b else _difference(pair, sign))
        rows.append({"name": a.rows.cell.scoring.name, "cells": cells})
    return {"rows": rows, "names": [one.rows.cell.scoring.name for one in shown]}


def _difference(pair: Pair, sign: float) -> dict[str, object]:
    ends = sorted((sign * pair.difference.low, sign * pair.difference.high))
    return {
        "value": _signed(sign * pair.difference.value),
        "low": _signed(ends[0]),
        "high": _signed(ends[1]),
        "p": pair.adjusted,
        "delong": None if pair.delong is None else pair.delong.p,
        "differs": pair.adjusted < 0.05,
    }


def _strata(results: Sequence[CellResult], headline: str) -> list[dict[str, object]]:
    """Each column as a table: groups across, cells down."""
    tables: list[dict[str, object]] = []
    for column in dict.fromkeys(part.column for result in results for part in result.strata):
        cells = {
            result.rows.cell.scoring.name: {part.value: part for part in result.strata if part.column == column}
            for result in results
        }
        first = next(iter(cells.values()))
        values = list(first)
        tables.append(
            {
                "column": column,
                "groups": [(value, first[value].slides, first[value].patients) for value in values],
                "rows": [
                    (name, [_judged(found.get(value), headline) for value in values]) for name, found in cells.items()
                ],
            }
        )
    return tables


def _judged(part: Stratum | None, headline: str) -> str:
    return "too few to judge" if part is None or part.measures is None else _digits(part.measures[headline])


def _calibration(one: CohortResult, results: Sequence[CellResult]) -> str | None:
    """Of the best cells; of several classes, of the last one."""
    curves = {}
    for result in results[:CURVES]:
        found = result.calibrations(one.shared)
        if found:
            curves[result.rows.cell.scoring.name] = list(found.values())[-1]
    return _png(reliability_png(curves)) if curves else None


def _digits(value: float) -> str:
    return "not defined" if math.isnan(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    """With its sign, and none where nothing is left of it."""
    text = f"{value:+.3f}"
    return "0.000" if text in ("+0.000", "-0.000") else text


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _png(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
