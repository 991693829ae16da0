"""Several models of one recipe, as those of its folds, as one: their mean, from one reading of each slide.

How far the models are apart is what each output's spread says: the least and the most that one of them gives. It tells
of the training's luck with its patients, and not how often the truth lies within: it is no confidence interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ips.bag import Bag
from ips.network.model import IPSModel
from ips.selection.scorer import Scorer
from pipeline.bags.shared import together
from pipeline.bags.sources import Source, open_bag
from pipeline.bags.unseen import read_together
from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TaskConfig
from pipeline.config.recipe import Config
from pipeline.inference.metrics import Floats
from pipeline.inference.prediction import BagPrediction, load_model, predict_bag
from pipeline.model.folder import EMBED_WEIGHTS, MEMBERS, check_one_recipe, member_folders

Member = tuple[IPSModel, Config]


def load_any(folder: Path) -> list[Member]:
    """The models of an ensemble that was registered, in the order of their names, or the one of a model."""
    return load_members(folder / MEMBERS) if (folder / MEMBERS).is_dir() else [load_model(folder)]


def load_members(folder: Path) -> list[Member]:
    """The models of an ensemble's folder, in the order of their names.

    Raises:
        StageError: there is none, they are not of one recipe, or as `load_model`.
    """
    packed = folder / EMBED_WEIGHTS
    shared = packed if packed.is_file() else None
    places = member_folders(folder)
    check_one_recipe(places)
    return [load_model(place, shared) for place in places]


def predict_mean(members: Sequence[Member], slide: CohortSlide) -> dict[str, Floats]:
    """Task -> (K,), the mean of what each model gives alone (`BagPrediction.values`).

    Args:
        members: of one recipe: they see the same patches, or features, of a slide.
        slide: read where it lies.

    Raises:
        SlideError: the slide cannot be read or used.
    """
    config = members[0][1]

    def predict(sources: Sequence[Source]) -> BagPrediction:
        bag = open_bag(sources[0], threads=torch.get_num_threads(), augment=None)
        return mean_of(predict_each(members, [None] * len(members), bag), config.tasks)

    return dict(read_together(config, [slide], predict).values)


def predict_each(
    members: Sequence[Member], scorers: Sequence[Scorer | None], bag: Bag, *, pooled: bool = False
) -> list[BagPrediction]:
    """What each model says of a bag that is decoded once.

    Args:
        members: that see the same patches.
        scorers: of each (`prediction.bag_scorer`), or None.
        bag: N patches.
        pooled: see `predict_bag`.
    """
    works = [partial(_alone, member, scorer, pooled=pooled) for member, scorer in zip(members, scorers, strict=True)]
    found, _, _ = together(bag, works)
    return [_given(one) for one in found]


def mean_of(found: Sequence[BagPrediction], tasks: Sequence[TaskConfig]) -> BagPrediction:
    """Of several models: the mean of their outputs and of their attention; the patches that any of them selected."""
    attention = np.stack([one.attention for one in found]).mean(axis=0, dtype=np.float64).astype(np.float32)
    chosen = np.unique(np.concatenate([one.selected for one in found]))
    return replace(
        found[0],
        values={task.name: np.mean([one.values[task.name] for one in found], axis=0) for task in tasks},
        logits={task.name: np.mean([one.logits[task.name] for one in found], axis=0) for task in tasks},
        attention=attention,
        selected=chosen[np.argsort(-attention[chosen], kind="stable")],
        heads=None,
        pooled=None,
    )


def spread_of(found: Sequence[BagPrediction], tasks: Sequence[TaskConfig]) -> Mapping[str, tuple[float, float]]:
    """Output column -> the least and the most that a model gives."""
    spread: dict[str, tuple[float, float]] = {}
    for task in tasks:
        each = np.stack([one.values[task.name] for one in found])
        ends = zip(each.min(axis=0).tolist(), each.max(axis=0).tolist(), strict=True)
        spread |= dict(zip(task.output_columns, ends, strict=True))
    return spread


def _alone(member: Member, scorer: Scorer | None, bag: Bag, *, pooled: bool) -> BagPrediction:
    model, config = member
    return predict_bag(model, bag, config, scorer, pooled=pooled)


def _given(found: BagPrediction | Exception) -> BagPrediction:
    if isinstance(found, Exception):
        raise found
    return found
