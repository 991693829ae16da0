"""What a look at the validation split says: the loss, a score, and the measures of each task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ips.losses import mean_loss, task_loss
from pipeline.config_data import TaskConfig
from pipeline.inference import BagPrediction
from pipeline.labels import Label, target, truth
from pipeline.metrics import MEASURES, measure


def look(
    tasks: Sequence[TaskConfig], labels: Sequence[Mapping[str, Label | None]], found: Sequence[BagPrediction]
) -> dict[str, float]:
    """Metrics of n slides: val_loss, val_score (the mean over tasks of the first measure), val_<measure>_<task>.

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
    if not math.isnan(sum(first)):
        result["val_score"] = sum(first) / len(first)
    outputs = {task.name: torch.from_numpy(np.stack([one.logits[task.name] for one in found])) for task in tasks}
    targets = {task.name: torch.tensor([target(task, slide[task.name]) for slide in labels]) for task in tasks}
    losses = task_loss(outputs, targets, {task.name: task.kind for task in tasks})
    labelled = {task: loss for task, loss in losses.items() if loss.weight > 0}
    if labelled:
        result["val_loss"] = float(mean_loss(labelled))
    return result
