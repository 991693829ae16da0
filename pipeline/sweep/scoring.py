"""One slide, read once, to a row of each scoring: what a worker does; and what is packed into which reading."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ips.bag import Bag
from ips.network.model import IPSModel
from ips.selection.scorer import Scorer
from pipeline.bags.given import GivenSlide
from pipeline.bags.shared import together
from pipeline.bags.sources import Source, content_of, featured, open_bag, tiled
from pipeline.cohort.table import CohortSlide
from pipeline.errors import DamagedError, PipelineError, SlideError
from pipeline.inference.prediction import BagPrediction, bag_scorer, load_model, predict_bag, unpredicted
from pipeline.model.folder import at_hand
from pipeline.schema import SWEEP_ROWS
from pipeline.store.features import FeatureSlide
from pipeline.store.patches import StoredSlide
from pipeline.sweep.cells import Cell, Scoring
from pipeline.sweep.rows import Row
from pipeline.training.headroom import forget_peak, peak_bytes

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Task:
    """A slide, and the scorings that want it."""

    slide: CohortSlide
    source: str
    wanted: tuple[str, ...]
    """Digests of scorings."""


@dataclass(frozen=True)
class Pass:
    """Scorings that share one reading of each slide and fit into one process. Picklable."""

    scorings: tuple[Scoring, ...]
    store: str | None
    """Root of the patch store, whose tiles are taken where it has them."""

    def worker(self) -> Callable[[Task], list[Row]]:
        """What scores slides, its models loaded."""
        return Panel(self).score


class Panel:
    """The models of a pass, loaded; lives as long as its process."""

    def __init__(self, asked: Pass) -> None:
        self._store, self._stack = asked.store, ExitStack()
        self._scorings = {one.digest: one for one in asked.scorings}
        loaded: dict[str, IPSModel] = {}
        self._models: dict[str, IPSModel] = {}
        scorers: dict[tuple[str, str], Scorer | None] = {}
        self._scorers: dict[str, Scorer | None] = {}
        for digest, one in self._scorings.items():
            name = one.model.digest
            if name not in loaded:
                loaded[name], _ = load_model(at_hand(one.model.folder, self._stack))
            self._models[digest] = loaded[name]
            kind = (name, one.setting.precision) if one.setting.mode in ("exact", "window") else (name, "")
            if kind not in scorers:
                scorers[kind] = scorer_of(loaded[name], one)
            self._scorers[digest] = scorers[kind]

    def score(self, task: Task) -> list[Row]:
        """The rows of a slide, in the order of `task.wanted`; whatever is wrong with it stands in them."""
        scorings = [self._scorings[digest] for digest in task.wanted]
        try:
            with tiled(scorings[0].config, task.slide, self._store) as (source, scratch):
                rows = dict(self._rows(task, source, scratch, scorings))
                return [rows[digest] for digest in task.wanted]
        except (SlideError, DamagedError) as error:
            reason = error.reason if isinstance(error, SlideError) else "damaged"
            told = unpredicted(error, "in the cohort's mpp column") if isinstance(error, SlideError) else str(error)
            return [_failed(task, scoring, reason, told) for scoring in scorings]

    def _rows(self, task: Task, source: Source, scratch: str, scorings: Sequence[Scoring]) -> Iterator[tuple[str, Row]]:
        content = content_of(source)
        for group in _by_features(scorings):
            own = featured(group[0].config, source, scratch)
            bag = open_bag(own, threads=torch.get_num_threads(), augment=None)
            forget_peak()
            works = [partial(self._predict, scoring) for scoring in group]
            found, seconds, read_seconds = together(bag, works)
            shared = {
                "key": own.key,
                "content": content,
                "patches_total": own.n_patches,
                "n_bad_tiles": own.n_bad_tiles,
                "read_seconds": read_seconds,
                "bytes_read": _bytes_of(own),
                "peak_bytes": int(peak_bytes()),
            }
            for scoring, one, took in zip(group, found, seconds, strict=True):
                yield scoring.digest, {**_outcome(task, scoring, one, own.n_patches), **shared, "seconds": took}

    def _predict(self, scoring: Scoring, bag: Bag) -> BagPrediction:
        digest = scoring.digest
        return predict_bag(
            self._models[digest], bag, scoring.config, self._scorers[digest], seed=scoring.setting.seed or 0
        )


def scorer_of(model: IPSModel, scoring: Scoring) -> Scorer | None:
    """In the setting's precision; None where nothing is scored."""
    return bag_scorer(model, scoring.config, _DTYPES[scoring.setting.precision])


def _by_features(scorings: Sequence[Scoring]) -> list[list[Scoring]]:
    """Those that look at the same pixels, and those that look at the features of one encoder."""
    groups: defaultdict[object, list[Scoring]] = defaultdict(list)
    for scoring in scorings:
        config = scoring.config
        groups[config.embed if config.model.encoder.name == "features" else None].append(scoring)
    return list(groups.values())


def _outcome(task: Task, scoring: Scoring, found: BagPrediction | Exception, patches: int) -> Row:
    if isinstance(found, PipelineError):
        reason = (
            found.reason if isinstance(found, SlideError) else "damaged" if isinstance(found, DamagedError) else "crash"
        )
        return _failed(task, scoring, reason, str(found))
    if isinstance(found, Exception):
        return _failed(task, scoring, "crash", f"{type(found).__name__}: {found}")
    outputs = [value for one in scoring.config.tasks for value in found.values[one.name].tolist()]
    if not all(map(math.isfinite, outputs)):
        return _failed(task, scoring, "not-finite", f"the model gives {outputs}; its weights are no good")
    scored = len(found.selected) if scoring.setting.mode == "random" else patches
    return {**_blank(task, scoring), "outputs": outputs, "patches_scored": scored}


def lost(task: Task, scorings: Sequence[Scoring], message: str) -> list[Row]:
    """The rows of a slide whose worker was lost."""
    return [_failed(task, scoring, "crash", message) for scoring in scorings]


def _failed(task: Task, scoring: Scoring, reason: str, message: str) -> Row:
    return {**_blank(task, scoring), "reason": reason, "message": message}


def _blank(task: Task, scoring: Scoring) -> Row:
    empty: Row = {field.name: None if field.nullable else 0 for field in SWEEP_ROWS}
    return {
        **empty,
        "scoring": scoring.digest,
        "source": task.source,
        "slide_id": task.slide.slide_id,
        "precision": scoring.setting.precision,
        "seed": scoring.setting.seed,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "finished": time.time(),
    }


def _bytes_of(source: Source) -> int:
    """Of the patches that a reading takes; 0 of those that are drawn."""
    match source:
        case StoredSlide():
            return int(np.sum(source.index().length))
        case FeatureSlide() | GivenSlide():
            return (
                source.n_patches
                * source.dim
                * np.dtype(np.float16 if source.dtype == "float16" else np.float32).itemsize
            )
        case _:
            return 0


_GIB = 2**30
_COPIES = 2  # of a model's weights in a process: its own, and the one that scores


@dataclass(frozen=True)
class Reading:
    """One pass over slides."""

    work: Pass
    tasks: tuple[Task, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that are held at once."""
        return tuple(dict.fromkeys(scoring.model.name for scoring in self.work.scorings))

    @property
    def bytes(self) -> int:
        """That they take in a process."""
        return _held(self.work.scorings)


def readings(
    cells: Sequence[Cell], done: Mapping[str, Collection[str]], gib: float, store: str | None
) -> list[Reading]:
    """The passes that are needed; each slide once in each, whichever cohorts list it.

    Args:
        cells: all that is asked.
        done: digest of a scoring -> sources that have its row.
        gib: for the models of one process.
        store: root of the patch store.
    """
    wanted: defaultdict[str, dict[str, CohortSlide]] = defaultdict(dict)
    scorings: dict[str, Scoring] = {}
    for cell in cells:
        digest = cell.scoring.digest
        for slide, source in zip(cell.cohort.slides, cell.cohort.sources, strict=True):
            if source not in done[digest]:
                scorings[digest] = cell.scoring
                wanted[digest].setdefault(source, slide)
    by_pixels: defaultdict[str, list[Scoring]] = defaultdict(list)
    for scoring in scorings.values():
        by_pixels[scoring.pixels].append(scoring)
    packed = [part for group in by_pixels.values() for part in _packed(group, gib)]
    return [Reading(Pass(tuple(part), store), _tasks(part, wanted)) for part in packed]


def _packed(scorings: Sequence[Scoring], gib: float) -> list[list[Scoring]]:
    """In their order, as many as fit; one that does not fit alone is on its own."""
    parts: list[list[Scoring]] = []
    for scoring in scorings:
        if parts and _held([*parts[-1], scoring]) <= gib * _GIB:
            parts[-1].append(scoring)
        else:
            parts.append([scoring])
    return parts


def _held(scorings: Sequence[Scoring]) -> int:
    return _COPIES * sum({scoring.model.digest: scoring.model.bytes for scoring in scorings}.values())


def _tasks(scorings: Sequence[Scoring], wanted: Mapping[str, Mapping[str, CohortSlide]]) -> tuple[Task, ...]:
    slides: dict[str, CohortSlide] = {}
    takers: defaultdict[str, list[str]] = defaultdict(list)
    for scoring in scorings:
        for source, slide in wanted[scoring.digest].items():
            slides.setdefault(source, slide)
            takers[source].append(scoring.digest)
    return tuple(Task(slide, source, tuple(takers[source])) for source, slide in slides.items())
