"""The tile stage on Ray Data: slides of a cohort to committed slides of a patch store.

A row is a reference to slides, or to parts of one; pixels never pass through Ray's object store. First, groups of
slides: each task tiles its small ones and plans its large ones. Then shares of the large ones, whose parts tasks
write straight to the store from any node; the driver commits a slide when its last share is done. A bad slide costs
that slide. The tasks load no torch.
"""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import ConfigError, NodeError, PipelineError, SlideError, StorageError
from pipeline.ingest.balance import group_slides, share_count, shares
from pipeline.ingest.isolated import begin_slide, store_share
from pipeline.ingest.tiler import LargeSlide, finish_slide, may_go_further, quarantined
from pipeline.ingest.versions import Looked, look_at
from pipeline.progress import progress
from pipeline.storage.attempts import MAX_ATTEMPTS, attempt
from pipeline.store.parts import part_count
from pipeline.store.patches import PatchStore, SlideStatus
from pipeline.telemetry import add, drain

WAVE = 1024  # tasks handed to Ray Data at a time: plans of 10 KB that the driver sends along

Outcome = SlideStatus | LargeSlide | None


@dataclass(frozen=True)
class _Job:
    """What all tasks of one call share. Picklable."""

    run: str
    spec: TilingConfig
    store: str
    cpus: float
    pixels: bool


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
) -> list[SlideStatus]:
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
        start: called before the first slide is tiled, where there is one; Ray is initialised then at the latest.

    Raises:
        StorageError: the store itself cannot be read or written, or no slide at all can be reached (wrong
            credentials, server down).
    """
    versions = look_at(slides, spec) if versions is None else versions
    patches = PatchStore(store, spec.fingerprint())
    statuses, sizes = _look_up(slides, versions, spec, patches)
    unreachable = [s for s in statuses.values() if s.reason is not None and s.reason.startswith("source: ")]
    if unreachable and len(unreachable) == len(slides):
        raise StorageError(f"no slide can be reached; the first one: {unreachable[0].reason}")
    for status in statuses.values():
        on_status(status)
    if sizes:
        patches.forget_gone()  # what is tiled in their place may be otherwise
        start()
    for number, status in _tile(slides, sizes, _Job(uuid.uuid4().hex, spec, store, cpus, pixels)):
        statuses[number] = status
        on_status(status)
    return [statuses[number] for number in range(len(slides))]


def _look_up(
    slides: Sequence[CohortSlide],
    versions: Sequence[Looked],
    spec: TilingConfig,
    patches: PatchStore,
) -> tuple[dict[int, SlideStatus], dict[int, int]]:
    """Statuses of the slides that need no work, done before or out of reach; bytes of the others' files. By number."""
    statuses: dict[int, SlideStatus] = {}
    sizes: dict[int, int] = {}
    known = patches.statuses(slides, [None if isinstance(v, SlideError) else v for v in versions])
    for number, (slide, version, status) in enumerate(zip(slides, versions, known, strict=True)):
        if isinstance(version, SlideError):
            statuses[number] = quarantined(slide, version.reason, version)
        elif status is None or may_go_further(status, spec):
            sizes[number] = version.size
        else:
            statuses[number] = status
    return statuses, sizes


def _tile(slides: Sequence[CohortSlide], sizes: dict[int, int], job: _Job) -> Iterator[tuple[int, SlideStatus]]:
    """Tile the slides whose numbers and bytes are given; statuses come as they are final."""
    if not sizes:
        return
    numbers = list(sizes)
    groups = group_slides(list(sizes.values()), _slots(job.cpus))
    items = [pickle.dumps([(numbers[place], slides[numbers[place]]) for place in group]) for group in groups]
    large: dict[int, LargeSlide] = {}
    for number, outcome in _run(_tile_group, items, job):
        if isinstance(outcome, LargeSlide):
            large[number] = outcome
        else:
            assert outcome is not None
            yield number, outcome
    if large:
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
    with progress("tile", sum(patches.values()), "patches of large slides") as done:
        for number, outcome in _run(_tile_share, items, job):
            assert not isinstance(outcome, LargeSlide)
            open_shares[number] -= 1
            total, count, ended = patches[number], len(cut[number]), len(cut[number]) - open_shares[number]
            done.advance(total * ended // count - total * (ended - 1) // count)
            if outcome is not None:
                final.setdefault(number, outcome)
            if not open_shares[number]:
                yield number, final.get(number) or finish_slide(large[number], job.spec, job.store)


def _slots(cpus: float) -> float:
    """Tasks that the cluster runs at a time."""
    import ray

    return max(1.0, float(ray.cluster_resources().get("CPU", 1.0)) / cpus)


def _run(
    task: Callable[[dict[str, bytes], _Job], Iterator[dict[str, Any]]], items: Iterable[bytes], job: _Job
) -> Iterator[tuple[int, Outcome]]:
    """Run one task for each item on Ray, in waves; results come as tasks end."""
    import ray.data  # loads for seconds, and a complete store needs none of it

    rest = iter(items)
    while wave := [{"item": item} for item in islice(rest, WAVE)]:
        dataset = ray.data.from_items(wave, override_num_blocks=len(wave))
        for row in dataset.flat_map(task, fn_kwargs={"job": job}, num_cpus=job.cpus).iter_rows():
            add(pickle.loads(row["sums"]))
            if row["failure"] is not None:
                raise pickle.loads(row["failure"])
            yield row["number"], pickle.loads(row["outcome"])


def _tile_group(row: dict[str, bytes], job: _Job) -> Iterator[dict[str, Any]]:
    """Small slides to statuses, large ones to plans."""
    work: list[tuple[int, CohortSlide]] = pickle.loads(row["item"])
    for number, slide in work:
        begin = partial(begin_slide, slide, job.spec, job.store, pixels=job.pixels)
        yield _guarded(number, f"{job.run}-{number}", slide, begin)


def _tile_share(row: dict[str, bytes], job: _Job) -> Iterator[dict[str, Any]]:
    """Some parts of a large slide."""
    work: tuple[int, LargeSlide, range] = pickle.loads(row["item"])
    number, large, parts = work
    share = partial(store_share, large, parts, job.spec, job.store)
    yield _guarded(number, f"{job.run}-{number}-{parts.start}", large.slide, share)


def _guarded(number: int, name: str, slide: CohortSlide, work: Callable[[], Outcome]) -> dict[str, Any]:
    """The row of what the work gives; a failing store or node is data, so that Ray neither retries nor wraps it."""
    try:
        with attempt(name) as attempts:
            if attempts <= MAX_ATTEMPTS:
                return _row(number, work)
            killed = RuntimeError(
                f"{slide.uri}: its process was killed {MAX_ATTEMPTS} times, as Ray and the kernel do where memory runs "
                "out; raise tiling.cpus, so that fewer tasks share a node's memory"
            )
            return _row(number, lambda: quarantined(slide, "crash", killed))
    except NodeError as error:
        return _failure(number, error)


def _row(number: int, work: Callable[[], Outcome]) -> dict[str, Any]:
    try:
        outcome = work()
    except (StorageError, ConfigError) as error:
        return _failure(number, error)
    return {"number": number, "outcome": pickle.dumps(outcome), "failure": None, "sums": pickle.dumps(drain())}


def _failure(number: int, error: PipelineError) -> dict[str, Any]:
    return {"number": number, "outcome": b"", "failure": pickle.dumps(error), "sums": pickle.dumps(drain())}
