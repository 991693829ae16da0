"""The parts of the tiling benchmark that need a process of their own: `python -m tests.bench.tiling_jobs JOB ...`.

Prints one JSON object.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Literal

from pipeline.cluster import prepare_environment
from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.ingest.tiler import store_slide
from pipeline.slides.open import open_slide
from pipeline.store.commit import plan_slide, write_slide
from pipeline.store.parts import part_patches, read_part
from pipeline.store.patches import PatchStore
from pipeline.tiling.cutting import Cutter
from pipeline.tiling.slide import tile_slide
from tests.bench.canvas import repeat
from tests.bench.processes import cpu_seconds

ALL = TilingConfig(codec="original", tissue="none")  # the glass too: patches are tiles
UNALIGNED = TilingConfig(patch_px=224, tissue="none")
WORK = TilingConfig(patch_px=224)
_CUT = 4000


def tile(kind: str, slide: str, store: str) -> dict[str, float]:
    """Commit an aligned slide; or read a part from the middle of one that is not, as one task of many does."""
    spec = ALL if kind == "aligned" else UNALIGNED
    with open_slide(Path(slide)) as reader:
        tiling = tile_slide(reader, spec, 0.5)
        if kind == "aligned":
            write_slide(PatchStore(store, spec.fingerprint()), plan_slide("0", 0.5, reader, tiling), lambda: None)
        else:
            middle = len(tiling.cells) // part_patches(224) // 2
            for number in range(middle, middle + 3):
                read_part(tiling, number)
    return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "patches": len(tiling.cells)}


def cut(slide: str, workers: str) -> dict[str, float]:
    """Processes that begin together decode and encode 4000 patches each, not aligned: seconds until the last is done.

    CPU time is that of the busiest.
    """
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(int(workers)), context.SimpleQueue()
    processes = [context.Process(target=_cut, args=(slide, barrier, queue)) for _ in range(int(workers))]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    starts, ends, used = zip(*found, strict=True)
    return {"patches": _CUT, "wall_s": max(ends) - min(starts), "cpu_s": max(used)}


def _cut(slide: str, barrier: Barrier, queue: SimpleQueue[tuple[float, float, float]]) -> None:
    with open_slide(Path(slide)) as reader:
        tiling = tile_slide(reader, WORK, 0.5)
        origins = tiling.grid.level_origins(tiling.cells)[:_CUT]
        cutter = Cutter(reader, tiling.grid, WORK)
        barrier.wait()
        start, used = time.monotonic(), time.process_time()
        deque(cutter.each(origins), maxlen=0)
        queue.put((start, time.monotonic(), time.process_time() - used))


def cohort(canvas: str, folder: str, slides: int) -> list[CohortSlide]:
    """Slides of one size that differ in content."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [repeat(Path(canvas), Path(folder, f"{number}.tiff"), 1, 1, salt=number + 1) for number in range(slides)]
    return [CohortSlide(path.stem, str(path), path.stem, None, None, {}, {}) for path in paths]


def store_all(slides: Sequence[CohortSlide], store: str) -> None:
    for slide in slides:
        assert store_slide(slide, WORK, store).status == "committed"


def ray(canvas: str, folder: str, seconds: str) -> dict[str, float]:
    """Seconds of wall time for at least `seconds` of work on two cores, with Ray and without.

    Work is CPU time, the system's included, of the processes without Ray; so many slides as the second one, when all
    is loaded, says, and a tenth more.
    """
    first, second = cohort(canvas, folder, 2)
    store_all([first], f"{folder}/first")
    start = time.process_time()
    store_all([second], f"{folder}/first")
    slides = cohort(canvas, folder, 2 * math.ceil(1.1 * float(seconds) / (time.process_time() - start) / 2))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=store_all, args=(slides[i::2], f"{folder}/plain")) for i in range(2)]
    start, used = time.perf_counter(), _children_cpu()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    plain = time.perf_counter() - start
    work = _children_cpu() - used
    start = time.perf_counter()
    import ray as cluster

    from pipeline.ingest.graph import tile_cohort

    cluster.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    started = time.perf_counter() - start
    start = time.perf_counter()
    statuses = tile_cohort(slides, WORK, f"{folder}/ray", cpus=1, on_status=lambda status: None)
    with_ray = time.perf_counter() - start
    cluster.shutdown()
    assert {status.status for status in statuses} == {"committed"}
    return {"plain": plain, "ray": with_ray, "start": started, "work": work}


def _children_cpu() -> float:
    """Seconds of the processes that have ended, the system's on their behalf included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def stage(codec: Literal["checked", "original"], folder: str, *paths: str) -> dict[str, float]:
    """The whole stage on Ray, from slides to committed patches, glass too; Ray is started before the clock."""
    import ray as cluster

    from pipeline.ingest.graph import tile_cohort

    spec = TilingConfig(codec=codec, tissue="none")
    slides = [CohortSlide(Path(path).stem, path, path, None, None, {}, {}) for path in paths]
    prepare_environment()
    cluster.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    wall, cpu = time.perf_counter(), cpu_seconds()
    statuses = tile_cohort(slides, spec, folder, cpus=1, on_status=lambda status: None)
    took = {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_seconds() - cpu}
    cluster.shutdown()
    assert {status.status for status in statuses} == {"committed"}
    return {"tiles": float(sum(status.n_patches for status in statuses)), **took}


if __name__ == "__main__":
    job, *arguments = sys.argv[1:]
    jobs = {"tile": tile, "cut": cut, "ray": ray, "stage": stage}
    print(json.dumps(jobs[job](*arguments)))  # type: ignore[operator]
