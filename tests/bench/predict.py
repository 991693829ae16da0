"""Prediction: what a batch costs beside the scoring alone: `python -m tests.bench.predict`.

Times are of the CPU, of this process and its children, so that what else a machine does counts little; but a patch
takes more of it while caches are shared, so passes at other loads do not compare. The share within one call does.

- 64 slides, from a store and read where they lie, against the bare scoring loop over the same stored patches. The goal:
  at least 90% of its rate. What a batch adds to a slide (maps, pictures, outlines) does not grow with the encoder, so
  the share depends on how many patches a slide has and how long each takes; here a ResNet-18 on patches of 224 px.
- Every patch of a slide of 250,000 as GeoJSON: below 10 s, and below 200 MB more than before.
- Effects of 250,000 patches, against their scoring at the rate that was measured: below 5%.
- An overlay and outlines of a slide of 250,000 patches, and its attention as a large Parametric Map.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
import torch
from pydicom import dcmread

from ips.bag import Values
from ips.network.effects import effects
from pipeline.bags.sources import open_bag
from pipeline.cohort.table import CohortSlide
from pipeline.config.recipe import Config
from pipeline.inference.heatmap import Heatmap, overlay_png
from pipeline.inference.prediction import BagPrediction, bag_scorer, load_model, predict_bag
from pipeline.ingest.tiler import store_slide
from pipeline.predictions import slide as slide_module
from pipeline.predictions.dicom import write_maps
from pipeline.predictions.run import How, predict
from pipeline.predictions.shapes import LEVELS, top_geojson, write_all
from pipeline.store.patches import PatchStore, StoredSlide
from tests.dicom import write_series
from tests.pipeline.small import small_config, write_model
from tests.synth import tissue_rgb, write_pyramid


def _cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a piece of work, its child processes' included where they have ended, and what it gives."""

    def spent() -> float:
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime

    began = spent()
    found = work()
    return spent() - began, found


@contextmanager
def _memory() -> Iterator[list[float]]:
    """MB that the process holds beyond what it held at the beginning of the block, every 10 ms of it."""
    process, over, found = psutil.Process(), threading.Event(), [0.0]
    before = process.memory_info().rss

    def watch() -> None:
        while not over.wait(0.01):
            found.append((process.memory_info().rss - before) / 1e6)

    watching = threading.Thread(target=watch)
    watching.start()
    yield found
    over.set()
    watching.join()


def _config() -> Config:
    aggregator = {"heads": 8, "key_dim": 64, "hidden_dim": 2048}
    return small_config(
        tiling={"patch_px": 224, "mpp": None, "min_tissue": 0.1, "edge": "drop", "artefacts": "keep"},
        model={
            "encoder": {"stages": 4},
            "aggregator": aggregator,
            "select": {"memory": 64, "chunk": 64, "context": "all"},
        },
    )


def batch(folder: Path, count: int, edge: int) -> dict[str, float]:
    """A batch from a store, one without, and the loop over the stored patches that does nothing but score."""
    config = _config()
    model = str(write_model(folder, config))
    store, slides = str(folder / "store"), []
    for number in range(count):
        path = write_pyramid(folder / f"s{number}.tif", tissue_rgb(edge, edge, seed=number % 4), levels=1, mpp=None)
        slides.append(CohortSlide(f"s{number}", str(path), "p", None, None, {}, {}))
    keys = [store_slide(slide, config.tiling, store).key for slide in slides]
    stored = PatchStore(store, config.tiling.fingerprint()).slides([str(key) for key in keys])
    network, _ = load_model(folder)
    scorer, threads = bag_scorer(network, config), torch.get_num_threads()

    def bare(some: Sequence[StoredSlide] = stored) -> None:
        for one in some:
            predict_bag(network, open_bag(one, threads=threads, augment=None), config, scorer)

    uris = [slide.uri for slide in slides]
    bare(stored[:1])
    predict(model, uris[:1], None, folder / "first", tracking_uri="-")  # imports, once
    loop, _ = _cpu(bare)
    scored: list[float] = []

    def timed(*arguments: Any, **further: Any) -> BagPrediction:
        found: BagPrediction
        spent, found = _cpu(lambda: predict_bag(*arguments, **further))
        scored.append(spent)
        return found

    with mock.patch.object(slide_module, "predict_bag", timed):
        kept, _ = _cpu(lambda: predict(model, uris, None, folder / "kept", tracking_uri="-", how=How(store=store)))
    began = time.perf_counter()
    passed, _ = _cpu(lambda: predict(model, uris, None, folder / "passed", tracking_uri="-"))
    again = time.perf_counter()
    predict(model, uris, None, folder / "passed", tracking_uri="-")
    patches = sum(one.n_patches for one in stored)
    return {
        "slides": count,
        "patches": patches,
        "bare_cpu_s": loop,
        "from_store_cpu_s": kept,
        "read_cpu_s": passed,
        "share_from_store": loop / kept,
        "share_within_the_call": sum(scored) / kept,
        "a_slide_adds_within_the_call_cpu_s": (kept - sum(scored)) / count,
        "a_slide_adds_cpu_s": (kept - loop) / count,
        "read_wall_s": again - began,
        "done_already_wall_s": time.perf_counter() - again,
        "patch_cpu_ms": 1e3 * loop / patches,
    }


def many(folder: Path, patches: int, patch_ms: float) -> dict[str, float]:
    """What is made of a slide of many patches."""
    side = int(patches**0.5) + 1
    rows = np.arange(patches)
    score = np.random.default_rng(0).gamma(0.3, 1 / 0.3, patches).astype(np.float32)
    table = pa.table({
        "row": rows, "x": rows % side * 256, "y": rows // side * 256, "size": np.full(patches, 256, np.float32),
        "score": score, "attention": score / patches, "selected": rows < 64,
        "effect_tumour_no": score, "effect_tumour_yes": -score,
    })  # fmt: skip
    facts = {
        "slide_id": "a", "origin": [0, 0], "patch": 256.0, "levels": list(LEVELS), "model": {}, "maps": {},
    }  # fmt: skip
    with (folder / "all.geojson.gz").open("wb") as file, _memory() as more:
        listed, _ = _cpu(lambda: write_all(file, facts, table))
    outlined, _ = _cpu(lambda: top_geojson(facts, table))
    whole = side * 256
    slide = Heatmap(
        np.full((512, 512, 3), 220, np.uint8), whole / 512, rows % side * 256, rows // side * 256, 256.0,
        score / score.sum(), 0.25, (whole, whole),
    )  # fmt: skip
    drawn, _ = _cpu(lambda: overlay_png(slide, 20.0))
    model, _ = load_model(folder)
    pooling = model.pooling.attention
    heads, width = pooling.heads, pooling.value_dim
    values = Values(torch.randn(patches, heads * pooling.tasks), torch.randn(patches, heads, width))
    explained, _ = _cpu(lambda: effects(model, values))
    return {
        "many_patches": patches,
        "geojson_cpu_s": listed,
        "geojson_mb": (folder / "all.geojson.gz").stat().st_size / 1e6,
        "geojson_more_memory_mb": max(more),
        "outlines_cpu_s": outlined,
        "overlay_cpu_s": drawn,
        "effects_cpu_s": explained,
        "effects_of_scoring": explained / (patches * patch_ms / 1e3),
    }


def dicom(folder: Path, patches: int) -> dict[str, float]:
    """A map of many patches on a level of 31.6 MPx, of files without px, which it does not need."""
    side, patch, factor, px = int(patches**0.5) + 1, 256, 32, 5625
    whole = px * factor
    paths = write_series(folder / "dicom", tissue_rgb(128, 128), factors=(1, factor), tile=512)
    for path, edge in zip(paths, (whole, px), strict=True):
        image = dcmread(path)
        image.TotalPixelMatrixColumns = image.TotalPixelMatrixRows = edge
        image.NumberOfFrames = (-(-edge // 512)) ** 2
        image.save_as(path)
    rows, step = np.arange(patches), whole // side
    attention = np.random.default_rng(0).random(patches).astype(np.float32)
    columns: dict[str, np.ndarray] = {"x": rows % side * step, "y": rows // side * step, "attention": attention}
    facts = {
        "uri": "a", "dimensions": [whole, whole], "patch": float(patch), "n_patches": patches,
        "model": {"source": "m", "digest": "0" * 32},
        "maps": {"attention": {"unit": "share", "version": "attention/1"}},
    }  # fmt: skip
    with _memory() as more:
        spent, _ = _cpu(lambda: write_maps(str(folder / "dicom"), facts, columns, folder))
    size = (folder / "attention.dcm").stat().st_size / 1e6
    return {"dicom_map_cpu_s": spent, "dicom_map_mb": size, "dicom_map_more_memory_mb": max(more)}


def main() -> None:
    """Print a table and, as the last line, JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slides", type=int, default=64)
    parser.add_argument("--edge", type=int, default=2500, help="px of a slide")
    parser.add_argument("--patches", type=int, default=250_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = batch(folder, asked.slides, asked.edge)
        found |= many(folder, asked.patches, found["patch_cpu_ms"])
        found |= dicom(folder, asked.patches)
    for key, value in found.items():
        sys.stdout.write(f"{key:28}{value:14,.4g}\n")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
