"""Heatmaps of a few slides of a cell: the slides are read once more, and the pictures kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from pipeline import cluster
from pipeline.bags.sources import open_bag
from pipeline.bags.unseen import featured, tiled
from pipeline.cohort.table import CohortSlide
from pipeline.config.recipe import Config
from pipeline.errors import PipelineError
from pipeline.inference.heatmap import Heatmap, highest, overlay_png
from pipeline.inference.prediction import load_model, predict_bag, read_thumbnail
from pipeline.model.folder import at_hand
from pipeline.storage.files import join, read_if_there, write_bytes
from pipeline.store.patches import PatchStore
from pipeline.sweep.cells import Cell, Scoring
from pipeline.sweep.scoring import scorer_of

log = logging.getLogger(__name__)

MAP_PX = 560  # longer edge of a slide


def draw_overlays(config: Config, cell: Cell, places: Sequence[int], root: str) -> dict[int, bytes]:
    """Place of a slide in the cell's cohort -> a PNG; without those that cannot be read any more."""
    assert config.sweep is not None
    cohort, found = cell.cohort, dict[int, bytes]()
    kept = {place: join(root, "overlays", f"{cell.scoring.digest}-{cohort.sources[place]}.png") for place in places}
    for place, uri in kept.items():
        if (picture := read_if_there(uri)) is not None:
            found[place] = picture
    missing = [place for place in places if place not in found]
    if not missing:
        return found
    folder, settings = join(root, "models", cell.scoring.model.digest), config.cluster
    arguments = (cell.scoring, folder, [cohort.slides[place] for place in missing], config.storage.patches)
    if config.sweep.workers == 0:
        drawn = draw_slides(*arguments)
    else:
        with cluster.connected(settings):
            drawn = cluster.call(
                draw_slides,
                arguments,
                cpus=settings.cpus_per_worker,
                gpus=settings.gpus_per_worker,
                timeout_s=settings.start_timeout_s,
                advice="where memory is short, set sweep.overlays=0",
            )
    for place, made in zip(missing, drawn, strict=True):
        if made is not None:
            found[place] = made
            write_bytes(kept[place], made)
    return found


def draw_slides(scoring: Scoring, folder: str, slides: Sequence[CohortSlide], store: str | None) -> list[bytes | None]:
    """A PNG of each slide; None where it cannot be read."""
    with ExitStack() as stack:
        local = at_hand(folder, stack)
        model, scoring = load_model(local)[0], scoring.at(local)
        patches = None if store is None else PatchStore(store, scoring.config.tiling.fingerprint())
        pictures: list[bytes | None] = []
        for slide in slides:
            try:
                with tiled(scoring.config, slide, patches) as (pixels, scratch):
                    source = featured(scoring.config, pixels, scratch)
                    bag = open_bag(source, threads=torch.get_num_threads(), augment=None)
                    scorer, seed = scorer_of(model, scoring), scoring.setting.seed or 0
                    found = predict_bag(model, bag, scoring.config, scorer, seed)
                    index = source.index()
                    heatmap = Heatmap(
                        read_thumbnail(source), source.thumbnail_scale, index.x, index.y, source.extent,
                        found.attention, source.mpp,
                    )  # fmt: skip
            except PipelineError as error:
                log.warning("sweep: no heatmap of %s: %s", slide.slide_id, error)
                pictures.append(None)
                continue
            told = [
                f"{name} {value:.3f}"
                for task in scoring.config.tasks
                for name, value in zip(task.output_columns, found.values[task.name], strict=True)
            ]
            caption = (slide.slide_id, ", ".join(told), scoring.name)
            pictures.append(overlay_png(heatmap, highest([found.attention]), caption=caption, map_px=MAP_PX))
        return pictures
