"""One slide, read once, to a row of each scoring: what a worker does; and what is packed into which reading."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ips.bag import Bag
from ips.network.model import IPSModel
from ips.selection.scorer import Scorer
from pipeline.bags.shared import together
from pipeline.bags.sources import Source, content_of, open_bag, patch_bytes
from pipeline.bags.unseen import featured, known, tiled
from pipeline.cohort.table import CohortSlide
from pipeline.errors import DamagedError, PipelineError, SlideError
from pipeline.inference.prediction import BagPrediction, bag_scorer, load_model, predict_bag, unpredicted
from pipeline.inference.shards import Cut, Joined, Scores, Strip, borders, strip_logits
from pipeline.model.folder import at_hand
from pipeline.schema import SWEEP_ROWS
from pipeline.store.patches import PatchStore
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
    shard_above: int | None = None
    """Patches of a slide in that store, from which several processes score it."""
    shards: int = 1
    """How many."""

    def worker(self) -> Callable[[Any], Any]:
        """What scores slides, its models loaded: a `Task` to rows, or to a `Cut` into `Shard`s; see `Panel.work`."""
        return Panel(self).work

    def patches(self) -> PatchStore | None:
        """Of the one tiling that scorings of one reading have."""
        return None if self.store is None else PatchStore(self.store, self.scorings[0].config.tiling.fingerprint())


@dataclass(frozen=True)
class Shard:
    """Rows of a large slide's patches."""

    task: Task
    rows: int
    """Of the whole slide."""
    start: int
    stop: int


@dataclass(frozen=True)
class Scored:
    """What came of a shard, by the scoring's digest."""

    logits: Mapping[str, Tensor | Exception]
    """(n, J), or what went wrong."""
    seconds: Mapping[str, float]
    read_seconds: float


class Panel:
    """The models of a pass, loaded; lives as long as its process."""

    def __init__(self, asked: Pass) -> None:
        self._asked, self._store, self._stack = asked, asked.patches(), ExitStack()
        self._scorings: dict[str, Scoring] = {}
        loaded: dict[str, tuple[IPSModel, Path]] = {}
        self._models: dict[str, IPSModel] = {}
        scorers: dict[tuple[str, str], Scorer | None] = {}
        self._scorers: dict[str, Scorer | None] = {}
        for one in asked.scorings:
            digest, name = one.digest, one.model.digest
            if name not in loaded:
                folder = at_hand(one.model.folder, self._stack)
                loaded[name] = load_model(folder)[0], folder
            self._models[digest], folder = loaded[name]
            self._scorings[digest] = one.at(folder)
            kind = (name, one.setting.precision) if one.setting.mode in ("exact", "window") else (name, "")
            if kind not in scorers:
                scorers[kind] = scorer_of(self._models[digest], one)
            self._scorers[digest] = scorers[kind]

    def work(self, item: Task | Shard | Joined[Task]) -> list[Row] | Cut[Shard] | Scored:
        """Rows of a slide; or, of a large one that is stored, shards, then their logits, then rows."""
        match item:
            case Shard():
                return self._shard(item)
            case Joined():
                return self.score(item.item, item.found)
        return self._cut(item) or self.score(item)

    def score(self, task: Task, shards: Sequence[Scored] = ()) -> list[Row]:
        """The rows of a slide, in the order of `task.wanted`; whatever is wrong with it stands in them.

        `shards` have the logits of all its patches, of those scorings that can be split.
        """
        scorings = [self._scorings[digest] for digest in task.wanted]
        split = self._split(task) if shards else []
        try:
            with tiled(scorings[0].config, task.slide, self._store) as (source, scratch):
                whole = [scoring for scoring in scorings if scoring not in split]
                rows = {scoring.digest: self._joined(task, source, scoring, shards) for scoring in split}
                rows |= dict(self._rows(task, source, scratch, whole))
                return [rows[digest] for digest in task.wanted]
        except (SlideError, DamagedError) as error:
            reason = error.reason if isinstance(error, SlideError) else "damaged"
            told = unpredicted(error, "in the cohort's mpp column") if isinstance(error, SlideError) else str(error)
            return [_failed(task, scoring, reason, told) for scoring in scorings]

    def _split(self, task: Task) -> list[Scoring]:
        """Scorings whose logits can come from anywhere: of pixels, by exact selection, with nothing summed beside."""
        scorings = [self._scorings[digest] for digest in task.wanted]
        return [
            scoring
            for scoring in scorings
            if scoring.setting.mode == "exact"
            and scoring.config.model.select.context == "none"
            and scoring.config.model.encoder.name != "features"
        ]

    def _cut(self, task: Task) -> Cut[Shard] | None:
        """The shards of a large slide; None of one that is scored here."""
        above, config = self._asked.shard_above, self._scorings[task.wanted[0]].config
        if above is None or self._store is None or config.cohort.megapixel_mnist is not None or not self._split(task):
            return None
        try:
            stored = known(config, task.slide, self._store)
        except SlideError:
            return None  # told by whoever scores it
        if stored is None or stored.n_patches <= above:
            return None
        n = stored.n_patches
        return Cut(tuple(Shard(task, n, start, stop) for start, stop in borders(n, self._asked.shards)))

    def _shard(self, shard: Shard) -> Scored:
        scorings = self._split(shard.task)
        try:
            with tiled(scorings[0].config, shard.task.slide, self._store) as (source, _):
                bag = Strip(open_bag(source, threads=torch.get_num_threads(), augment=None), shard.start, shard.stop)
                found, seconds, reading = together(bag, [partial(self._logits, one, shard.rows) for one in scorings])
        except (SlideError, DamagedError) as error:
            return Scored({one.digest: error for one in scorings}, {one.digest: 0.0 for one in scorings}, 0.0)
        digests = [one.digest for one in scorings]
        return Scored(dict(zip(digests, found, strict=True)), dict(zip(digests, seconds, strict=True)), reading)

    def _logits(self, scoring: Scoring, rows: int, own: Bag) -> Tensor:
        scorer = self._scorers[scoring.digest]
        assert scorer is not None  # mode exact
        return strip_logits(own, rows, scorer, scoring.config.model.select.chunk)

    def _joined(self, task: Task, source: Source, scoring: Scoring, shards: Sequence[Scored]) -> Row:
        """A row of what shards have scored; seconds are those of all of them."""
        forget_peak()
        digest, began = scoring.digest, time.perf_counter()
        found: BagPrediction | Exception
        parts = [shard.logits[digest] for shard in shards]
        if wrong := [part for part in parts if isinstance(part, Exception)]:
            found = wrong[0]
        else:
            bag = open_bag(source, threads=torch.get_num_threads(), augment=None)
            logits = torch.cat([part for part in parts if isinstance(part, Tensor)])
            model, scorer = self._models[digest], self._scorers[digest]
            found = predict_bag(model, bag, scoring.config, scorer, scores=Scores(logits))
        seconds = time.perf_counter() - began + sum(shard.seconds[digest] for shard in shards)
        row = _outcome(task, scoring, found, source.n_patches)
        return {**row, **_facts(source, source, sum(s.read_seconds for s in shards)), "seconds": seconds}

    def _rows(self, task: Task, source: Source, scratch: str, scorings: Sequence[Scoring]) -> Iterator[tuple[str, Row]]:
        for group in _by_features(scorings):
            own = featured(group[0].config, source, scratch)
            bag = open_bag(own, threads=torch.get_num_threads(), augment=None)
            forget_peak()
            works = [partial(self._predict, scoring) for scoring in group]
            found, seconds, read_seconds = together(bag, works)
            shared = _facts(source, own, read_seconds)
            for scoring, one, took in zip(group, found, seconds, strict=True):
                yield scoring.digest, {**_outcome(task, scoring, one, own.n_patches), **shared, "seconds": took}

    def _predict(self, scoring: Scoring, bag: Bag) -> BagPrediction:
        digest = scoring.digest
        return predict_bag(
            self._models[digest], bag, scoring.config, self._scorers[digest], seed=scoring.setting.seed or 0
        )


def _facts(source: Source, own: Source, read_seconds: float) -> Row:
    """What a row says of a slide, of which the model takes `own`."""
    return {
        "key": own.key,
        "content": content_of(source),
        "patches_total": own.n_patches,
        "n_bad_tiles": own.n_bad_tiles,
        "read_seconds": read_seconds,
        "bytes_read": patch_bytes(own),
        "peak_bytes": int(peak_bytes()),
    }


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
