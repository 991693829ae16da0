"""The evaluation as one HTML page that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.cohort.labels import Label, counts
from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.config.data import TaskConfig
from pipeline.config.recipe import Config
from pipeline.inference.figures import reliability_png, roc_png, scatter_png
from pipeline.inference.heatmap import Heatmap, highest, overlay_png
from pipeline.inference.intervals import Interval
from pipeline.inference.metrics import Ints
from pipeline.inference.operating import Decision, Proportion, decide
from pipeline.inference.prediction import read_thumbnail
from pipeline.inference.scores import calibrations, title
from pipeline.pages import render_page
from pipeline.results.evaluate import Evaluation, TaskResult
from pipeline.results.strata import Stratum

RIGHT, WRONG, PATCHES = 4, 4, 6  # pictures of a task, and patches beside each
MAP_PX = 560  # longer edge of a slide in them
_AT_THRESHOLD = ("threshold", "sensitivity", "specificity")  # shown with their counts


@dataclass(frozen=True)
class SlideRow:
    """One slide of one task, as the page shows it."""

    place: int
    """Among the evaluated slides."""
    slide_id: str
    patient_id: str
    n_patches: int
    label: str
    predicted: str
    right: bool | None
    """Whether the prediction is the label; None for a number, which is never quite right."""
    rank: float
    """Confidence in the prediction: the probability of the predicted class, or the least of all labels'; of a number,
    the number itself."""
    values: tuple[float, ...]
    """One number for each of the task's outputs."""


def render_report(evaluation: Evaluation, config: Config, cohort: Cohort, lineage: Mapping[str, str]) -> str:
    """The page, a few MB at most: pictures are of at most 8 slides a task.

    Args:
        evaluation: what to show.
        config: of the model; shown whole.
        cohort: the whole cohort, for the numbers of every split.
        lineage: name -> value of what the model came from: digests, run ids, git sha, versions.

    Raises:
        StorageError: thumbnails or patches cannot be read from the patch store.
    """
    top = highest(found.attention for found in evaluation.found)
    return render_page(
        "results/report.html",
        {"percent": _percent, "digits": _digits, "share": _share, "ends": _ends_of, "title": title},
        name=config.name,
        evaluation=evaluation,
        headline=_headline(evaluation),
        resamples=config.evaluate.bootstrap,
        splits=_splits(cohort, evaluation, config.tasks),
        cohort=cohort,
        tasks=[_task(evaluation, result, top) for result in evaluation.tasks],
        strata=_strata(evaluation.tasks),
        memory=config.model.select.memory,
        lineage=lineage,
        config=json.dumps(config.model_dump(mode="json"), indent=2),
    )


def _headline(evaluation: Evaluation) -> list[tuple[str, Interval]]:
    several = "Mean " if len(evaluation.tasks) > 1 else ""
    return [(_sentence(several + title(name)), found) for name, found in evaluation.measures.items()]


def _sentence(title: str) -> str:
    """Lower case after the first word, but for abbreviations."""
    first, *rest = title.split(" ")
    return " ".join([first, *(word if word[:2].isupper() or word[:1] == "R" else word.lower() for word in rest)])


def _splits(cohort: Cohort, evaluation: Evaluation, tasks: Sequence[TaskConfig]) -> list[dict[str, object]]:
    """Numbers of every split as the cohort lists it; `evaluated` are the committed slides that were predicted."""
    rows: list[dict[str, object]] = []
    for split in ("train", "val", "test"):
        slides = cohort.subset(split)
        evaluated = len(evaluation.slides) if split == evaluation.split else None
        rows.append(
            {
                "split": split,
                "slides": len(slides),
                "patients": len({slide.patient_id for slide in slides}),
                "labels": {task.name: _label_counts(task, slides) for task in tasks},
                "evaluated": evaluated,
            }
        )
    return rows


def _label_counts(task: TaskConfig, slides: Sequence[CohortSlide]) -> str:
    return counts(task, [slide.labels.get(task.name) for slide in slides])


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _digits(value: float) -> str:
    return "not defined" if np.isnan(value) else f"{value:.3f}"


def _ends_of(found: Interval) -> str:
    """The bounds of an interval, in words."""
    return "no interval: too few hold it" if np.isnan(found.low) else f"{found.low:.3f} to {found.high:.3f}"


def _share(found: Proportion) -> str:
    low, high = found.bounds
    return f"{found.hits} of {found.n}" + (f", {found.value:.3f} ({low:.3f} to {high:.3f})" if found.n else "")


@dataclass(frozen=True)
class Call:
    """What is called at a threshold, of a binary task."""

    title: str
    decision: Decision
    confusion: Ints


def _calls(result: TaskResult) -> list[Call]:
    """At one half, and at the threshold that the validation slides chose, where they did."""
    if result.confusion is None or result.task.kind != "binary":
        return []
    scores, positive = result.values[:, 1], result.truth == 1
    calls = [Call("one half", decide(scores, positive), result.confusion)]
    if result.threshold is not None and result.confusion_there is not None:
        title = f"{result.threshold:.3f}, chosen on validation slides"
        calls.append(Call(title, decide(scores, positive, result.threshold), result.confusion_there))
    return calls


def _strata(results: Sequence[TaskResult]) -> list[Stratum]:
    """Of all tasks, group by group."""
    parts = [part for result in results for part in result.strata]
    places = {group: place for place, group in enumerate(dict.fromkeys((part.column, part.value) for part in parts))}
    return sorted(parts, key=lambda part: places[part.column, part.value])


def _task(evaluation: Evaluation, result: TaskResult, top: float) -> dict[str, object]:
    rows = [_row(evaluation, result, i) for i in range(len(result.slides))]
    ranked = sorted(rows, key=lambda row: (-row.rank, row.slide_id))
    wrong = [row for row in ranked if row.right is False]
    right = [row for row in ranked if row.right is not False]
    calibration = calibrations(result.task, result.values, result.truth)
    further = {name: value for name, value in result.scores.items() if name not in (*result.measures, *_AT_THRESHOLD)}
    best = _spread(right, result.task.classes) if result.confusion is not None else _ends(right)
    return {
        "result": result,
        "measures": [(title(name), found) for name, found in result.measures.items()],
        "classes": result.task.classes,
        "shown": result.task.outputs[1:] if result.task.kind == "binary" else result.task.outputs,
        "judged": not ranked or ranked[0].right is not None,
        "further": further,
        "calls": _calls(result),
        "calibration": calibration,
        "reliability": _data_uri(reliability_png(calibration), "png") if calibration else None,
        "roc": _data_uri(roc_png(result.roc), "png") if result.roc else None,
        "scatter": _scatter(result),
        "rows": [*wrong, *right],
        "wrong": [_picture(evaluation, row, top) for row in wrong[:WRONG]],
        "n_wrong": len(wrong),
        "right": [_picture(evaluation, row, top) for row in best],
    }


def _spread(rows: Sequence[SlideRow], classes: Sequence[str]) -> list[SlideRow]:
    """The most confident rows, the classes taking turns, the last class (binary: the positive one) first."""
    queues = [[row for row in rows if row.label == label] for label in reversed(classes)]
    turns = [queue[turn] for turn in range(RIGHT) for queue in queues if turn < len(queue)]
    return turns[:RIGHT]


def _ends(rows: Sequence[SlideRow]) -> list[SlideRow]:
    """The first rows and the last ones."""
    return [*rows[: RIGHT // 2], *rows[RIGHT // 2 :][-(RIGHT // 2) :]]


def _scatter(result: TaskResult) -> str | None:
    """Predicted against true values, of a regression."""
    if result.task.kind != "regression":
        return None
    return _data_uri(scatter_png(result.truth, result.values[:, 0], result.task.column), "png")


def _row(evaluation: Evaluation, result: TaskResult, i: int) -> SlideRow:
    place = int(result.slides[i])
    slide, stored = evaluation.slides[place]
    return SlideRow(
        place,
        slide.slide_id,
        slide.patient_id,
        stored.n_patches,
        _text(result.labels[i]),
        _text(result.predicted[i]),
        None if result.task.kind in ("regression", "survival") else result.labels[i] == result.predicted[i],
        _rank(result, i),
        tuple(result.values[i].tolist()),
    )


def _text(label: Label) -> str:
    return label if isinstance(label, str) else f"{label:.4g}"


def _rank(result: TaskResult, i: int) -> float:
    if result.task.kind in ("regression", "survival"):
        return float(result.predicted[i])
    values = result.values[i]
    return float(np.maximum(values, 1 - values).min() if result.task.kind == "multilabel" else values.max())


def _picture(evaluation: Evaluation, row: SlideRow, top: float) -> dict[str, object]:
    _, stored = evaluation.slides[row.place]
    attention, index = evaluation.found[row.place].attention, stored.index()
    shown = np.argsort(-attention, kind="stable")[:PATCHES]
    slide = Heatmap(
        read_thumbnail(stored), stored.thumbnail_scale, index.x, index.y, stored.extent, attention, stored.mpp
    )
    picture = overlay_png(slide, top, marks=shown.tolist(), map_px=MAP_PX)
    patches = [
        {
            "image": _data_uri(data, "jpeg"),
            "attention": float(attention[place]),
            "x": int(index.x[place]),
            "y": int(index.y[place]),
        }
        for place, data in zip(shown.tolist(), stored.payloads(shown), strict=True)
    ]
    return {"row": row, "overlay": _data_uri(picture, "png"), "patches": patches}


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
