"""The tile stage on Ray Data: slides of a cohort to committed slides of a patch store.

A row is a reference to slides, or to parts of one; pixels never pass through Ray's object store. First, groups of
slides: each task tiles its small ones and plans its large ones. Then shares of the large ones, whose parts tasks
write straight to the store from any node; the driver commits a slide when its last share is done. A bad slide costs
that slide. The tasks load no torch. What is little work, as a few new slides beside many known ones, may be done in the
driver's process, which costs less than starting Ray.
"""

from __future__ import annotations

import pickle
import time
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress, islice
from typing import Any, TypeVar

import numpy as np
import pyarrow.compute as pc

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import ConfigError, StorageError
from pipeline.ingest.balance import SLIDE_BYTES, group_slides, share_count, shares
from pipeline.ingest.group import Group, Keys
from pipeline.ingest.isolated import read_slide, store_share
from pipeline.ingest.statuses import in_order, look_up, numbered
from pipeline.ingest.tiler import LargeSlide, ReadSlide, finished, quarantined
from pipeline.ingest.versions import Looked, look_at
from pipeline.progress import progress
from pipeline.storage.attempts import MAX_ATTEMPTS, attempt
from pipeline.storage.files import SourceVersion
from pipeline.store.catalogue import Row
from pipeline.store.parts import part_count
from pipeline.store.patches import PatchStore, SlideStatus
from pipeline.telemetry import add, drain
from pipeline.tiling.guide import check_network

TOGETHER = 64  # large slides committed by one file of the catalogue; after a kill the next run finds their folders
LITTLE = 2**24  # bytes of slides, with `SLIDE_BYTES` each: of JPEG two to seven seconds of work, and Ray takes thirteen
TOLD_S = 3.0  # between commits of what is done here
WAVE = 1024  # tasks handed to Ray Data at a time: plans of 10 KB that the driver sends along

Outcome = SlideStatus | LargeSlide | None
Result = TypeVar("Result")
Work = Callable[[Any, "_Job"], Iterator[tuple[int, Outcome]]]
"""What is done for one item."""


@dataclass(frozen=True)
class _Job:
    """What all tasks of one call share. Picklable."""

    run: str
    spec: TilingConfig
    store: str
    cpus: float
    pixels: bool
    known: Callable[[], Keys]
    """Gives the keys of the slides that were committed before."""
    here: bool = False
    """In this process, not on Ray."""


def tile_cohort(
    slides: Sequence[CohortSlide],
    spec: TilingConfig,
    store: str,
    *,
    cpus: float,
    on_status: Callable[[SlideStatus], None],
    pixels: bool = True,
    versions: Sequence[Looked] | None = None,
    start: Callable[[], None] = lambda: None,
    here: bool = False,
) -> Sequence[SlideStatus]:
    """Tile the slides that the store does not know yet; statuses come back in the order of `slides`.

    Each slide is committed on its own, and the parts of a large one are kept: after an interruption the next call goes
    on with the rest.

    Args:
        slides: rows of the cohort; two with the same content become one stored slide.
        spec: how to tile.
        store: root of the patch store.
        cpus: CPUs that Ray reserves for each task.
        on_status: called once for every slide, known ones first, then as they are finished.
        pixels: False commits where the patches of each slide are, and none of them (`streamed.plan_root`).
        versions: of the slides' files, where they were looked at already.
        start: called before the first slide is tiled on Ray, where there is one; Ray is initialised then at the latest.
        here: do it in this process where it is less work than Ray's start (`LITTLE`).

    Raises:
        StorageError: the store itself cannot be read or written, no slide at all can be reached (wrong credentials,
            server down), or the network that finds the tissue of a slide to be tiled cannot be read.
        ConfigError: that network is not the one that is named, or cannot be run (`guide.check_network`).
    """
    versions = look_at(slides, spec) if versions is None else versions
    patches = PatchStore(store, spec.fingerprint())
    fresh = array("q")
    known = numbered(look_up(slides, versions, spec, patches, fresh))
    unreachable = known.filter(pc.starts_with(known.table["reason"], "source: "))
    if unreachable and len(unreachable) == len(slides):
        raise StorageError(f"no slide can be reached; the first one: {unreachable[0].reason}")
    for status in known:
        on_status(status)
    if not fresh:
        return in_order(known)
    check_network((slides[number] for number in fresh), spec)
    patches.forget_gone()  # what is tiled in their place may be otherwise
    here = here and _is_little(versions, fresh, spec)
    keys = np.sort(patches.view.slides["key"].to_numpy().astype("S32"))
    if here:
        job = _Job(uuid.uuid4().hex, spec, store, cpus, pixels, lambda: keys, here)
    else:
        start()
        job = _Job(uuid.uuid4().hex, spec, store, cpus, pixels, _shared(keys), here)

    def tiled() -> Iterator[tuple[int, SlideStatus]]:
        for number, status in _tile(slides, versions, fresh, job, start):
            on_status(status)
            yield number, status

    return in_order(known, numbered(tiled()))


def _is_little(versions: Sequence[Looked], fresh: Sequence[int], spec: TilingConfig) -> bool:
    """Whether tiling these slides is less work than Ray's start."""
    if spec.tissue_model is not None or len(fresh) * SLIDE_BYTES > LITTLE:  # a network takes minutes a slide
        return False
    return sum(SLIDE_BYTES + _size(versions[number]) for number in fresh) <= LITTLE


def _size(version: Looked) -> int:
    return version.size if isinstance(version, SourceVersion) else 0


def _shared(keys: Keys) -> Callable[[], Keys]:
    """Gives tasks the keys of all committed slides, 32 bytes each, once a node."""
    import ray

    return partial(ray.get, ray.put(keys))


def _tile(
    slides: Sequence[CohortSlide],
    versions: Sequence[Looked],
    fresh: Sequence[int],
    job: _Job,
    start: Callable[[], None],
) -> Iterator[tuple[int, SlideStatus]]:
    """Tile the slides of these numbers; statuses come as they are final.

    A large one goes to Ray in any case: a small file may hold many patches.
    """
    wanted = np.zeros(len(slides), bool)
    wanted[fresh] = True
    sizes = [_size(version) for version in compress(versions, wanted)]
    groups = [list(range(len(sizes)))] if job.here else group_slides(sizes, _slots(job.cpus))
    named = ([fresh[place] for place in group] for group in groups)
    items = (pickle.dumps([(number, slides[number], versions[number]) for number in group]) for group in named)
    large: dict[int, LargeSlide] = {}
    for number, outcome in _run(_grouped, items, job):
        if isinstance(outcome, LargeSlide):
            large[number] = outcome
        else:
            assert outcome is not None
            yield number, outcome
    if large:
        if job.here:
            start()
            job = replace(job, here=False, known=lambda: np.empty(0, "S32"))  # for shares nobody asks what is known
        yield from _tile_large(large, job)


def _tile_large(large: dict[int, LargeSlide], job: _Job) -> Iterator[tuple[int, SlideStatus]]:
    """Tile the planned slides share by share, and commit each one when its last share is done."""
    cut: dict[int, list[range]] = {}
    for number, slide in large.items():
        parts = part_count(slide.planned.tiling)
        cut[number] = shares(parts, share_count(parts, slide.planned.tiling.grid.patch_px))
    open_shares = {number: len(parts) for number, parts in cut.items()}
    items = (pickle.dumps((number, large[number].share(parts), parts)) for number in cut for parts in cut[number])
    final: dict[int, SlideStatus] = {}
    patches = {number: len(slide.planned.tiling.cells) for number, slide in large.items()}
    group = Group(PatchStore(job.store, job.spec.fingerprint()), np.empty(0, "S32"))
    with progress("tile", sum(patches.values()), "patches of large slides") as done:
        try:
            for number, outcome in _run(_cut, items, job):
                assert not isinstance(outcome, LargeSlide)
                open_shares[number] -= 1
                total, count, ended = patches[number], len(cut[number]), len(cut[number]) - open_shares[number]
                done.advance(total * ended // count - total * (ended - 1) // count)
                if outcome is not None:
                    final.setdefault(number, outcome)
                if not open_shares[number]:
                    known = (final[number], []) if number in final else finished(large[number], job.spec, job.store)
                    group.add_status(number, *known)
                if len(group) >= TOGETHER:
                    yield from group.commit()
        except (StorageError, ConfigError):
            yield from group.commit()
            raise
        yield from group.commit()


def _slots(cpus: float) -> float:
    """Tasks that the cluster runs at a time."""
    import ray

    return max(1.0, float(ray.cluster_resources().get("CPU", 1.0)) / cpus)


def _run(work: Work, items: Iterable[bytes], job: _Job) -> Iterator[tuple[int, Outcome]]:
    """Do the work for each item: here, or in a task of Ray's, in waves; results come as tasks end."""
    if job.here:
        for item in items:
            yield from work(pickle.loads(item), job)
        return
    import ray.data  # loads for seconds, and a complete store needs none of it

    rest = iter(items)
    while wave := [{"item": item} for item in islice(rest, WAVE)]:
        dataset = ray.data.from_items(wave, override_num_blocks=len(wave))
        for row in dataset.flat_map(_tile_task, fn_kwargs={"work": work, "job": job}, num_cpus=job.cpus).iter_rows():
            add(pickle.loads(row["sums"]))
            if row["failure"] is not None:
                raise pickle.loads(row["failure"])
            yield row["number"], pickle.loads(row["outcome"])


def _grouped(work: Sequence[tuple[int, CohortSlide, SourceVersion]], job: _Job) -> Iterator[tuple[int, Outcome]]:
    """Small slides to statuses, large ones to plans.

    Slides with a final status are committed together, also those that were done before the store or node failed.
    """
    group, committed = Group(PatchStore(job.store, job.spec.fingerprint()), job.known()), time.monotonic()
    try:
        for number, slide, version in work:
            read = partial(read_slide, slide, version, job.spec, job.store, pixels=job.pixels)
            found, rows = _attempted(f"{job.run}-{number}", read, partial(_killed_alone, slide))
            if isinstance(found, ReadSlide):
                group.add(number, found)
            elif isinstance(found, SlideStatus):
                group.add_status(number, found, rows)
            else:
                yield number, found
            if group.is_full or (job.here and time.monotonic() - committed > TOLD_S):
                yield from group.commit()
                committed = time.monotonic()
    except (StorageError, ConfigError):
        yield from group.commit()
        raise
    yield from group.commit()


def _cut(work: tuple[int, LargeSlide, range], job: _Job) -> Iterator[tuple[int, Outcome]]:
    """Some parts of a large slide."""
    number, large, parts = work
    share = partial(store_share, large, parts, job.spec, job.store)
    yield number, _attempted(f"{job.run}-{number}-{parts.start}", share, lambda: _killed(large.slide))


def _attempted(name: str, work: Callable[[], Result], killed: Callable[[], Result]) -> Result:
    """What the work gives; what `killed` gives where the process was ended at it too often.

    Raises:
        StorageError, ConfigError: the store, or this node, fails.
    """
    with attempt(name) as attempts:
        if attempts > MAX_ATTEMPTS:
            return killed()
        try:
            return work()
        except (StorageError, ConfigError) as error:
            failure = error
    raise failure


def _killed(slide: CohortSlide) -> SlideStatus:
    killed = RuntimeError(
        f"{slide.uri}: its process was killed {MAX_ATTEMPTS} times, as Ray and the kernel do where memory runs out; "
        "raise tiling.cpus, so that fewer tasks share a node's memory"
    )
    return quarantined(slide, "crash", killed)


def _killed_alone(slide: CohortSlide) -> tuple[SlideStatus, list[Row]]:
    return _killed(slide), []


def _tile_task(row: dict[str, bytes], work: Work, job: _Job) -> Iterator[dict[str, Any]]:
    """Outcomes as rows; a failing store or node is one of them, so that Ray neither retries nor wraps it."""
    try:
        for number, outcome in work(pickle.loads(row["item"]), job):
            yield {"number": number, "outcome": pickle.dumps(outcome), "failure": None, "sums": pickle.dumps(drain())}
    except (StorageError, ConfigError) as error:
        yield {"number": -1, "outcome": b"", "failure": pickle.dumps(error), "sums": pickle.dumps(drain())}
