"""A look at the validation split: its slides shared out over the ranks; the loss, a score, each task's measures.

A prediction depends on the slide and the weights alone, so a look says the same on any number of ranks.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ips.learning.losses import mean_loss, task_loss
from pipeline.cohort.labels import Label, target, truth
from pipeline.config.data import TaskConfig
from pipeline.errors import PipelineError, StageError
from pipeline.inference.metrics import MEASURES, labelled, measure
from pipeline.inference.operating import THRESHOLD, choose_threshold
from pipeline.inference.prediction import BagPrediction
from pipeline.training.plan import deal
from pipeline.training.ranks import Ranks, gathered


@dataclass(frozen=True)
class Outputs:
    """What is measured of one slide's prediction: the rest, as large as the slide, stays on its rank."""

    values: Mapping[str, npt.NDArray[np.float64]]
    """As `BagPrediction.values`."""
    logits: Mapping[str, npt.NDArray[np.float64]]
    """As `BagPrediction.logits`."""


def predict_together(
    predict: Callable[[int], BagPrediction], sizes: Sequence[int], ranks: Ranks, device: torch.device
) -> list[Outputs]:
    """The predictions of all slides, in their order, on every rank; each one makes its part. All call this together.

    Args:
        predict: slide index -> its prediction.
        sizes: patches of each slide.
        ranks: all of them.
        device: of this rank.

    Raises:
        Exception: what stopped a rank. Its peers have waited for its part: they raise the same PipelineError, or a
            RuntimeError that says what another kind was.
    """
    found: dict[int, Outputs] = {}
    failure: Exception | None = None
    try:
        for index in deal(sizes, ranks.world_size)[ranks.rank]:
            one = predict(index)
            found[index] = Outputs(one.values, one.logits)
    except Exception as error:  # raised below, when all ranks know of it
        failure = error
    ours = failure if isinstance(failure, PipelineError) else failure and repr(failure)
    parts = [pickle.loads(part) for part in gathered(pickle.dumps((found, ours)), ranks, device)]
    if failure is not None:
        raise failure
    for rank, (more, stopped) in enumerate(parts):
        if isinstance(stopped, PipelineError):
            raise stopped
        if stopped is not None:
            raise RuntimeError(f"worker {rank} failed in the validation: {stopped}")
        found |= more
    return [found[index] for index in range(len(sizes))]


def check_finite(found: Sequence[Outputs], metrics: Mapping[str, float], names: Sequence[str], what: str) -> None:
    """Refuse a look at slides of which the model says nothing any more; all ranks come to the same answer.

    Args:
        found: of every slide.
        metrics: what `look` makes of them.
        names: of the slides.
        what: the moment and the remedy.

    Raises:
        StageError: a logit or the loss is not finite.
    """
    for name, one in zip(names, found, strict=True):
        if not all(np.isfinite(logits).all() for logits in one.logits.values()):
            raise StageError(f"the logits of the validation slide {name} are not finite {what}")
    loss = metrics.get("val_loss", 0.0)
    if not math.isfinite(loss):
        raise StageError(f"the validation loss became {loss} {what}")


def look(
    tasks: Sequence[TaskConfig], labels: Sequence[Mapping[str, Label | None]], found: Sequence[Outputs]
) -> dict[str, float]:
    """Metrics of n slides: val_loss, val_score (the mean over tasks of the first measure), val_<measure>_<task>, and
    of binary tasks val_threshold_<task>, the score from which positive is called.

    What the labels cannot give is absent: an AUC of one class, a loss where no slide has a label. The loss is that of
    training without class weights.
    """
    result: dict[str, float] = {}
    first: list[float] = []
    for task in tasks:
        truths = np.array([truth(task, slide[task.name]) for slide in labels])
        values = np.stack([one.values[task.name] for one in found])
        measures = measure(task, values, truths)
        first.append(measures[0])
        named = zip(MEASURES[task.kind], measures, strict=True)
        result |= {f"val_{name}_{task.name}": value for name, value in named if not math.isnan(value)}
        known = labelled(truths)
        if task.kind == "binary" and (cut := choose_threshold(values[known, 1], truths[known] == 1)) is not None:
            result[f"{THRESHOLD}{task.name}"] = cut
    if not math.isnan(sum(first)):
        result["val_score"] = sum(first) / len(first)
    outputs = {task.name: torch.from_numpy(np.stack([one.logits[task.name] for one in found])) for task in tasks}
    targets = {task.name: torch.tensor([target(task, slide[task.name]) for slide in labels]) for task in tasks}
    losses = task_loss(outputs, targets, {task.name: task.kind for task in tasks})
    measured = {task: loss for task, loss in losses.items() if loss.weight > 0}
    if measured:
        result["val_loss"] = float(mean_loss(measured))
    return result
