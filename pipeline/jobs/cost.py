"""What a run will take, before it is begun: patches, bytes, requests, hours, each with a range and what it rests on."""

from __future__ import annotations

import logging
import math
import random
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.config.recipe import Config
from pipeline.errors import SlideError, StageError
from pipeline.jobs.rates import Measured, Rates, area_of
from pipeline.progress import progress

log = logging.getLogger(__name__)

_HEADERS = 200  # slides whose headers are read at most; the rest is taken to be like them
_THREADS = 16
_LEAST_SPREAD = 0.1  # either way: machines, neighbours and slides differ by that much from day to day
_PART, _WINDOW = 60e6, 16e6  # bytes of a stored part, and of a request that reads
_FILES = 8  # of a committed slide besides its parts


@dataclass(frozen=True)
class Estimate:
    """One quantity."""

    what: str
    low: float
    likely: float
    high: float
    unit: str
    rests_on: str


@dataclass(frozen=True)
class _Range:
    """A number with its relative spread; spreads of factors add up as independent ones do."""

    likely: float
    spread: float

    def times(self, factor: float, spread: float = 0.0) -> _Range:
        return _Range(self.likely * factor, math.hypot(self.spread, spread))

    def told(self, what: str, unit: str, rests_on: str) -> Estimate:
        spread = max(self.spread, _LEAST_SPREAD)
        low, high = self.likely / (1 + spread), self.likely * (1 + spread)
        return Estimate(what, low, self.likely, high, unit, rests_on)


def estimate(config: Config, cohort: Cohort, rates: Rates) -> list[Estimate]:
    """Of a run of all stages on a cohort of which nothing is done yet.

    Args:
        config: the recipe, and the cluster that is to do it.
        cohort: with its splits.
        rates: of the machines of that cluster.

    Raises:
        StageError: no slide's header can be read.
    """
    areas = _areas(config, cohort)
    sampled = f"{len(rates.slides)} slides tiled on {rates.machine}"
    of_headers = f"headers of {len(areas)} of {len(cohort.slides)} slides, tissue of {len(rates.slides)}"
    share = _ratio(rates.slides, lambda slide: slide.patches, lambda slide: slide.area)
    mean_area = _Range(statistics.fmean(areas.values()), _error(list(areas.values()), len(cohort.slides)))
    a_slide = mean_area.times(share.likely, share.spread)
    patches = a_slide.times(len(cohort.slides))
    tiling = _per_patch(rates, patches, lambda slide: slide.cpu_s)
    read = _per_patch(rates, patches, lambda slide: slide.read_bytes)
    stored = _per_patch(rates, patches, lambda slide: slide.stored_bytes)
    splits = {name: sum(slide.split == name for slide in cohort.slides) for name in ("train", "val", "test")}
    looks = -(-config.train.epochs // config.train.validate_every)
    trained = a_slide.times(splits["train"] * config.train.readings)
    scored = a_slide.times(splits["val"] * looks + splits[config.evaluate.split])
    learning = _Range(trained.likely * rates.train_s + scored.likely * rates.score_s, trained.spread)
    cluster = config.cluster
    cpus = cluster.fewest_workers * cluster.cpus_per_worker
    tile_hours, learn_hours = tiling.times(1 / 3600), learning.times(1 / 3600)
    wall = _Range(tile_hours.likely / cpus + learn_hours.likely / cluster.fewest_workers, a_slide.spread)
    requests = (
        read.likely / _WINDOW
        + stored.likely * (1 / _PART + (config.train.readings + 1) / _WINDOW)
        + _FILES * len(cohort.slides)
    )
    timed = (
        f"{rates.score_s * 1e3:.3g} ms to score and {rates.train_s * 1e3:.3g} ms to train a patch on {rates.machine}"
    )
    on = f"{cluster.fewest_workers} workers of {cluster.cpus_per_worker:g} CPUs and {cluster.gpus_per_worker:g} GPUs"
    found = [
        patches.told("patches", "", of_headers),
        read.times(1e-9).told("read by tiling", "GB", sampled),
        stored.times(1e-9).told("stored", "GB", sampled),
        _Range(requests, 1.0).told("requests", "", "bytes, at 16 MB a request and 60 MB a part"),
        tile_hours.told("tile", "CPU hours", sampled),
        learn_hours.times(cluster.cpus_per_worker).told("train and evaluate", "CPU hours", timed),
    ]
    if cluster.gpus_per_worker:
        rest = timed if rates.gpu else f"{timed}, which has no GPU: measure on a GPU machine"
        found.append(learn_hours.times(cluster.gpus_per_worker).told("train and evaluate", "GPU hours", rest))
    return [*found, wall.told("time on the cluster", "hours", on)]


def _areas(config: Config, cohort: Cohort) -> dict[str, float]:
    """Slide id -> area in patches, of slides that can be opened."""
    chosen = sorted(cohort.slides, key=lambda slide: slide.slide_id)
    if len(chosen) > _HEADERS:
        chosen = random.Random(config.seed).sample(chosen, _HEADERS)

    def look(slide: CohortSlide) -> float | None:
        try:
            return area_of(slide, config.tiling)
        except SlideError as error:
            log.warning("plan: %s is left out: %s", slide.slide_id, error)
            return None
        finally:
            done.advance()

    with progress("plan", len(chosen), "headers") as done, ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(look, chosen))
    areas = {slide.slide_id: area for slide, area in zip(chosen, found, strict=True) if area is not None}
    if not areas:
        raise StageError("plan --cost: no slide's header can be read; `tile` says why")
    return areas


def _ratio(
    slides: Sequence[Measured], above: Callable[[Measured], float], below: Callable[[Measured], float]
) -> _Range:
    """Ratio of two sums over the sample, with twice its standard error."""
    total = sum(map(below, slides))
    ratio = sum(map(above, slides)) / total
    if len(slides) < 2:  # one slide says nothing about how they differ
        return _Range(ratio, 1.0)
    rest = [above(slide) - ratio * below(slide) for slide in slides]
    error = math.sqrt(sum(r * r for r in rest) / (len(slides) - 1) / len(slides)) * len(slides) / total
    return _Range(ratio, 2 * error / ratio if ratio else 0.0)


def _per_patch(rates: Rates, patches: _Range, amount: Callable[[Measured], float]) -> _Range:
    each_patch = _ratio(rates.slides, amount, lambda slide: slide.patches)
    return patches.times(each_patch.likely, each_patch.spread)


def _error(values: Sequence[float], population: int) -> float:
    """Twice the relative standard error of a mean, over a sample of a finite population."""
    if len(values) >= population or len(values) < 2:
        return 0.0
    unseen = 1 - len(values) / population
    return 2 * statistics.stdev(values) / statistics.fmean(values) * math.sqrt(unseen / len(values))
