"""The stage between tiling and training on features: every tiled slide has its features committed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline import cluster
from pipeline.bags.embed import embed_slides
from pipeline.bags.sources import feature_store, patch_store
from pipeline.config.recipe import Config
from pipeline.model.build import check_encoder
from pipeline.progress import progress
from pipeline.store.features import stored_slides
from pipeline.workflow.stage import Record, Stage, Workspace, gone_from
from pipeline.workflow.stages import STAGES


def stages_for(config: Config, last: str) -> list[Stage]:
    """The stages up to and including `last`, in the order of the data's way; embed where features are wanted."""
    tile, *others = STAGES
    wanted = last == EMBED.name or (config.model.encoder.name == "features" and not config.given_features)
    stages = [tile, *([EMBED] if wanted else []), *others]
    return stages[: [stage.name for stage in stages].index(last) + 1]


def _identity(space: Workspace) -> Mapping[str, Any]:
    keys = space.records["tile"].tiled["key"].to_pylist()
    return {"store": feature_store(space.config)[0].uri, "slides": sorted(set(keys))}


def _embed(space: Workspace, stage_fingerprint: str, run_id: str) -> Record:
    config = space.config
    store, settings = feature_store(config)
    slides = stored_slides(patch_store(config), space.records["tile"].tiled["key"].to_pylist())
    for edge in {slide.patch_px for slide in slides}:
        check_encoder("embed.encoder", settings.encoder, edge)
    least, most = config.cluster.fewest_workers, config.cluster.most_workers
    cpus, gpus = config.cluster.cpus_per_worker, config.cluster.gpus_per_worker
    space.ray()
    cluster.require([cluster.Bundle(cpus, gpus)] * least, config.cluster.start_timeout_s, "embed")
    made: list[str] = []
    with progress("embed", len(slides), "slides") as done:

        def on_done(key: str) -> None:
            made.append(key)
            done.advance()

        embed_slides(slides, settings, store, actors=(least, most), cpus=cpus, gpus=gpus, on_done=on_done)
    store.tidy()
    metrics = {"slides": float(len(slides)), "features": float(sum(slide.n_patches for slide in slides))}
    space.tracker().log_metrics(run_id, metrics, 0)
    return Record("embed", stage_fingerprint, {"features": store.uri}, metrics, {"made": len(made)})


def _outdated(space: Workspace, _record: Record) -> str | None:
    """Slides whose features are not whole in the store any more; those alone are then made again."""
    return gone_from("features", space.records["tile"].tiled, feature_store(space.config)[0].gone)


EMBED = Stage("embed", _identity, _embed, _outdated)
