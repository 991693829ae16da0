"""Several models of one recipe, as those of its folds, as one: their mean, from one reading of each slide."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ips.bag import Bag
from ips.network.model import IPSModel
from pipeline.bags.shared import together
from pipeline.bags.sources import open_bag
from pipeline.bags.unseen import prepared
from pipeline.cohort.table import CohortSlide
from pipeline.config.recipe import Config
from pipeline.inference.metrics import Floats
from pipeline.inference.prediction import BagPrediction, load_model, predict_bag
from pipeline.model.folder import EMBED_WEIGHTS

Member = tuple[IPSModel, Config]


def load_members(folder: Path) -> list[Member]:
    """The models of an ensemble's folder, in the order of their names; errors as `load_model`."""
    packed = folder / EMBED_WEIGHTS
    shared = packed if packed.is_file() else None
    return [load_model(place, shared) for place in sorted(folder.iterdir()) if place.is_dir()]


def predict_mean(members: Sequence[Member], slide: CohortSlide) -> dict[str, Floats]:
    """Task -> (K,), the mean of what each model gives alone (`BagPrediction.values`).

    Args:
        members: of one recipe: they see the same patches, or features, of a slide.
        slide: tiled for the time of it.

    Raises:
        SlideError: the slide cannot be read or used.
    """
    config = members[0][1]
    with prepared(config, slide) as source:
        bag = open_bag(source, threads=torch.get_num_threads(), augment=None)
        found, _, _ = together(bag, [partial(_alone, member) for member in members])
    predictions = [_given(one) for one in found]
    return {task.name: np.mean([one.values[task.name] for one in predictions], axis=0) for task in config.tasks}


def _alone(member: Member, bag: Bag) -> BagPrediction:
    model, config = member
    return predict_bag(model, bag, config)


def _given(found: BagPrediction | Exception) -> BagPrediction:
    if isinstance(found, Exception):
        raise found
    return found
