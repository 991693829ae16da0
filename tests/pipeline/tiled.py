"""Slides, good and bad, for the tests of the tile stage, and what they leave in a store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.bags.streamed import StreamedSlide, open_streamed
from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.ingest import balance
from pipeline.ingest.tiler import begin_slide, finish_slide, store_share
from pipeline.ingest.versions import look_at
from pipeline.slides import identity
from pipeline.store import parts
from pipeline.store.catalogue import Catalogue
from pipeline.store.patches import PatchStore, SlideStatus
from tests.synth import cut, tissue_rgb, write_pyramid, zero_tile

RGB = tissue_rgb(613, 487)
PATCH = 64
SPEC = TilingConfig(patch_px=PATCH, min_tissue=0.4, edge="drop")  # 9 x 7 whole patches


def row(path: Path | str, mpp: float | None = None) -> CohortSlide:
    """A row of a cohort, named after its file."""
    name = Path(path).stem
    return CohortSlide(name, str(path), name, None, mpp, {"tumor": "1"}, {})


def spoilt(kind: str, good: Path, folder: Path) -> Path:
    """A copy of the good slide, or another one, that the tile stage refuses."""
    path = folder / f"{kind}.tiff"
    if kind == "blank":
        return write_pyramid(path, np.full((307, 411, 3), 244, np.uint8), levels=1)
    if kind == "no-mpp":
        return write_pyramid(path, RGB, levels=1, mpp=None)
    if kind == "absurd-mpp":
        return write_pyramid(path, RGB, levels=1, mpp=352.8)
    if kind == "coarse":
        return write_pyramid(path, RGB, levels=1, mpp=2.0)
    if kind == "tiny":
        return write_pyramid(path, tissue_rgb(61, 53), levels=1)
    if kind == "folder":
        path.mkdir()
        return path
    if kind != "none":
        shutil.copy(good, path)
    if kind == "zeroed":
        zero_tile(path, 0, 1)
    if kind in {"cut", "short", "empty"}:
        cut(path, {"cut": 0.7, "short": 0.97, "empty": 0.0}[kind])
    if kind == "text":
        path.write_text("not a slide")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that is not a killed writer's leftover, by path."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files if path.parent.name != "catalogue"}
    for place in folder.rglob("catalogue"):
        view = Catalogue(str(place.parent)).read()
        for name, table in (("slides", view.slides), ("sources", view.sources)):
            rows = table.drop_columns(["id"]).to_pylist()
            found[f"{place.relative_to(folder)}/{name}"] = json.dumps(rows).encode()
    return found


def what_is_stored(folder: Path) -> dict[str, object]:
    """What readers see of a store's specs: what became of each source, and each slide's patches, wherever they lie."""
    found: dict[str, object] = {}
    for place in folder.rglob("catalogue"):
        store = PatchStore(str(place.parent.parent), place.parent.name)
        found[f"{place.parent.name}/sources"] = store.view.sources.drop_columns(["id"]).to_pylist()
        for stored in store.slides(store.view.slides["key"].to_pylist()):
            index = stored.index_table().select(["row", "cell", "x", "y", "level", "length"])
            found[f"{place.parent.name}/{stored.key}"] = index.to_pydict(), stored.payloads(range(stored.n_patches))
    return found


def part_file(folder: Path | str, number: int = 0) -> Path:
    """The file of one part of a stored slide."""
    (path,) = Path(folder).glob(f"part-{number:05d}-*.arrow")
    return path


def small_tasks(patch: Callable[[object, str, object], None]) -> None:
    """Parts of 9 cells and tasks of 2 parts of `SPEC`: a small slide stands for one of 100,000 patches."""
    patch(parts, "MAX_PART_PATCHES", 9)
    patch(balance, "TASK_PX", 2 * 9 * PATCH**2)


def sampled_digests(patch: Callable[[object, str, object], None]) -> None:
    """Slides over 1 kB count as large: of tiles 0 to 8 of a level the digest takes 0, 2, 5 and 8."""
    for name, value in {"WHOLE": 1000, "EDGE": 500, "BLOCK": 50, "SAMPLES": 4}.items():
        patch(identity, name, value)


def tile_in_shares(slide: CohortSlide, store: str, spec: TilingConfig = SPEC) -> SlideStatus:
    """What the tasks of one run do with a large slide, one after another."""
    begun = begin_slide(slide, spec, store, whole=False)
    if isinstance(begun, SlideStatus):
        return begun
    count = parts.part_count(begun.planned.tiling)
    for share in balance.shares(count, balance.share_count(count, PATCH)):
        failed = store_share(begun.share(share), share, spec, store)
        if failed is not None:
            return failed
    return finish_slide(begun, spec, store)


def open_plan(slide: CohortSlide, spec: TilingConfig, plans: PatchStore, key: str | None) -> StreamedSlide:
    """A planned slide whose file is as it is now."""
    plans.look_again()
    (found,) = open_streamed([slide], look_at([slide], spec), spec, plans, [str(key)])
    return found
