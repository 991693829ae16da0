"""The evaluation as one HTML page that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from jinja2 import Environment, StrictUndefined

from pipeline.cohort import Cohort, CohortSlide
from pipeline.config import Config
from pipeline.config_data import TaskConfig
from pipeline.evaluate import Evaluation, TaskResult
from pipeline.figures import overlay_png, roc_png
from pipeline.inference import read_thumbnail
from pipeline.metrics import Interval

RIGHT, WRONG, PATCHES = 4, 4, 6  # pictures of a task, and patches beside each
MAP_PX = 560  # longer edge of a slide in them


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
    probabilities: tuple[float, ...]

    @property
    def right(self) -> bool:
        """Whether the most probable class is the true one."""
        return self.label == self.predicted

    @property
    def confidence(self) -> float:
        """Probability of the predicted class."""
        return max(self.probabilities)


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
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"percent": lambda value: f"{100 * value:.1f}%", "digits": lambda value: f"{value:.3f}"}
    template = page.from_string(files("pipeline").joinpath("report.html").read_text("utf-8"))
    return template.render(
        name=config.name,
        evaluation=evaluation,
        headline=_headline(evaluation),
        resamples=config.evaluate.bootstrap,
        splits=_splits(cohort, evaluation, config.tasks),
        cohort=cohort,
        tasks=[_task(evaluation, result) for result in evaluation.tasks],
        memory=config.model.select.memory,
        lineage=lineage,
        config=json.dumps(config.model_dump(mode="json"), indent=2),
    )


def _headline(evaluation: Evaluation) -> list[tuple[str, Interval]]:
    several = len(evaluation.tasks) > 1
    return [
        ("Mean AUC" if several else "AUC", evaluation.auc),
        ("Mean accuracy" if several else "Accuracy", evaluation.accuracy),
    ]


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
    counts = Counter(slide.labels.get(task.name) for slide in slides)
    known = [f"{label}: {counts[label]}" for label in task.classes]
    return ", ".join([*known, f"unlabelled: {counts[None]}"] if counts[None] else known)


def _task(evaluation: Evaluation, result: TaskResult) -> dict[str, object]:
    rows = [_row(evaluation, result, i) for i in range(len(result.slides))]
    by_confidence = sorted(rows, key=lambda row: (-row.confidence, row.slide_id))
    wrong = [row for row in by_confidence if not row.right]
    right = [row for row in by_confidence if row.right]
    best = _spread(right, result.task.classes)
    return {
        "result": result,
        "classes": result.task.classes,
        "roc": _data_uri(roc_png(result.roc), "png"),
        "rows": [*wrong, *right],
        "wrong": [_picture(evaluation, row) for row in wrong[:WRONG]],
        "n_wrong": len(wrong),
        "right": [_picture(evaluation, row) for row in best],
    }


def _spread(rows: Sequence[SlideRow], classes: Sequence[str]) -> list[SlideRow]:
    """The most confident rows, the classes taking turns, the last class (binary: the positive one) first."""
    queues = [[row for row in rows if row.label == label] for label in reversed(classes)]
    turns = [queue[turn] for turn in range(RIGHT) for queue in queues if turn < len(queue)]
    return turns[:RIGHT]


def _row(evaluation: Evaluation, result: TaskResult, i: int) -> SlideRow:
    place = int(result.slides[i])
    slide, stored = evaluation.slides[place]
    return SlideRow(
        place,
        slide.slide_id,
        slide.patient_id,
        stored.n_patches,
        result.task.classes[int(result.labels[i])],
        result.task.classes[int(result.probabilities[i].argmax())],
        tuple(result.probabilities[i].tolist()),
    )


def _picture(evaluation: Evaluation, row: SlideRow) -> dict[str, object]:
    _, stored = evaluation.slides[row.place]
    attention, index = evaluation.found[row.place].attention, stored.index()
    top = np.argsort(-attention, kind="stable")[:PATCHES]
    picture = overlay_png(
        read_thumbnail(stored),
        stored.thumbnail_scale,
        index.x,
        index.y,
        stored.extent,
        attention,
        marks=top.tolist(),
        map_px=MAP_PX,
    )
    patches = [
        {
            "image": _data_uri(data, "jpeg"),
            "attention": float(attention[place]),
            "x": int(index.x[place]),
            "y": int(index.y[place]),
        }
        for place, data in zip(top.tolist(), stored.payloads(top), strict=True)
    ]
    return {"row": row, "overlay": _data_uri(picture, "png"), "patches": patches}


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
