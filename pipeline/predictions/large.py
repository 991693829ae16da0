"""A bag too large for one actor: which can be cut, and a strip of it scored; an actor of the pool joins them.

The strips of a slide that no store has are cut out of the slide by each of the actors, which plans it anew: plans of
one file are equal.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ips.bag import Bag
from ips.selection.scorer import Scorer
from pipeline.bags.sources import BagSource, Source, open_bag
from pipeline.bags.unseen import as_one, read_together
from pipeline.cohort.table import CohortSlide
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError, DamagedError, PlanError, SlideError, StorageError
from pipeline.inference.shards import Cut, Scores, Strip, borders, joined_scores, strip_scores
from pipeline.store.patches import PatchStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """Rows of a bag's patches, for one actor."""

    slides: tuple[CohortSlide, ...]
    key: str
    """Of all the bag's patches, which must be these."""
    start: int
    stop: int


@dataclass(frozen=True)
class Scored:
    """What a shard's rows were given. Picklable."""

    key: str
    """Of all the bag's patches, when these were scored."""
    scores: Scores


def cut(config: Config, slides: Sequence[CohortSlide], whole: BagSource, above: int, parts: int) -> Cut[Shard] | None:
    """The shards of a large bag; None of one that is predicted alone.

    Only exact selection can be split, and only where patches are decoded. Shards begin where a chunk does. With
    `tiling.min_sharpness` none is: each actor would decode all patches to know which are left out.

    Args:
        config: of the model.
        slides: of the bag.
        whole: their patches.
        above: so many patches, and it is large.
        parts: how many shards there are, at most.
    """
    selecting, images = config.model.select, config.cohort.megapixel_mnist
    if whole.n_patches <= above or selecting.mode != "exact" or config.given_features or images:
        return None
    if config.tiling.min_sharpness is not None:
        return None
    ends = borders(whole.n_patches, parts, selecting.chunk)
    return Cut(tuple(Shard(tuple(slides), whole.key, *end) for end in ends))


def scored(shard: Shard, config: Config, scorer: Scorer, store: PatchStore | None) -> Scored | None:
    """What its rows are given.

    None where they cannot be read or scored, or are no longer those that were cut: whoever predicts the bag alone will
    say why, or leave such out.

    Raises:
        StorageError, ConfigError, MemoryError: this node's or the store's, and no slide's fault.
    """
    try:
        return read_together(config, shard.slides, partial(_scored, shard, config, scorer), store)
    except (SlideError, DamagedError):
        return None
    except (StorageError, ConfigError, MemoryError):
        raise
    except Exception:  # one slide's unforeseen failure must not end the others' batch
        log.exception("predict: rows of %s", ", ".join(slide.slide_id for slide in shard.slides))
        return None


def _scored(shard: Shard, config: Config, scorer: Scorer, sources: Sequence[Source]) -> Scored | None:
    whole, selecting = as_one(shard.slides, sources), config.model.select
    if whole.key != shard.key:
        return None
    strip = Strip(open_bag(whole, threads=torch.get_num_threads(), augment=None), shard.start, shard.stop)
    try:
        return Scored(shard.key, strip_scores(strip, scorer, selecting.chunk, context=selecting.context == "all"))
    except PlanError:
        return None  # a patch cannot be decoded; without it rows have other numbers


def together(found: Sequence[Scored | None], key: str, bag: Bag) -> Scores | None:
    """Of a bag, of its shards; None where one of them has none, or they are of other patches, as their key tells."""
    parts = [part.scores for part in found if part is not None and part.key == key]
    if len(parts) < len(found) or sum(len(part.logits) for part in parts) != len(bag):
        return None
    return joined_scores(parts)
