"""A tiny study after its training, for the tests of what comes then: stored slides, a checkpoint, a registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.bags.sources import patch_store
from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.config.recipe import Config
from pipeline.ingest.statuses import outcomes
from pipeline.ingest.versions import known, look_at
from pipeline.model.build import build_model, build_optimizer
from pipeline.model.checkpoint import Progress, take_snapshot
from pipeline.store.ledger import write_ledger
from pipeline.tracking.tracker import Tracker
from pipeline.training.saver import Saver
from pipeline.workflow.stage import Record, Workspace
from tests.pipeline.small import HEIGHT, WIDTH, small_config, store_slides

SITES = ("north", "south")
PLACES = {"root": "", "patches": "patches", "features": "features"}


def paint(path: Path, seed: int, label: str, shade: int = 0) -> None:
    """Tissue on glass; positive slides hold a dark square. `shade` is taken from the green, as of another stain."""
    generator = np.random.default_rng(seed)
    rgb = np.full((HEIGHT, WIDTH, 3), 244, np.uint8)
    low, high = (150, 60, 130), (200, 110, 190)
    rgb[8:, 5:170] = generator.integers(low, high, size=(HEIGHT - 8, 165, 3), dtype=np.uint8)
    if label == "yes":
        x, y = 16 + 32 * generator.integers(4), 16 + 32 * generator.integers(3)
        rgb[y : y + 40, x : x + 40] = generator.integers((60, 20, 90), (90, 40, 130), size=(40, 40, 3), dtype=np.uint8)
    rgb[..., 1] -= np.minimum(rgb[..., 1], shade)
    Image.fromarray(rgb).save(path)


def small_cohort(folder: Path, splits: Mapping[str, int]) -> Cohort:
    """So many slides a split, one a patient, labels in turn, sites in turn of pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    slides: list[CohortSlide] = []
    for split, count in splits.items():
        for number in range(count):
            name, label = f"{split}{number}", ("no", "yes")[number % 2]
            paint(folder / f"{name}.png", len(slides), label)
            extra = {"site": SITES[number // 2 % 2]}
            slides.append(
                CohortSlide(name, str(folder / f"{name}.png"), f"p-{name}", split, None, {"tumour": label}, extra)
            )
    return Cohort(str(folder / "cohort.csv"), tuple(slides))


@dataclass(frozen=True)
class Study:
    """Where it all is."""

    config: Config
    cohort: Cohort
    keys: dict[str, str]
    ledger: Mapping[str, str]
    """Of the tiling, by name."""
    tracker: Tracker

    def space(self, seed: int, **changes: Any) -> Workspace:
        """After the training of a model of random weights; `changes` are of the config."""
        config = Config.model_validate({**self.config.model_dump(), **changes})
        torch.manual_seed(seed)
        model = build_model(config)
        folder = f"{config.storage.root}/train/{seed}"
        with Saver(folder) as saver:
            saver.save(take_snapshot(model, build_optimizer(model, config.train), config, Progress(1, 1, "plan")))
        space = Workspace(config, self.cohort, lambda: self.tracker, lambda: None, {})
        tile = {"slides": float(len(self.keys)), "slides_quarantined": 0.0, "patches": 500.0, "bad_tiles": 1.0}
        space.records = {
            "tile": Record("tile", f"tile{seed}", self.ledger, tile, {}),
            "train": Record("train", f"train{seed}", {"checkpoint": f"{folder}/step-00000001"}, {}, {}, "run"),
        }
        return space


def small_study(folder: Path, tracker: Tracker, splits: Mapping[str, int]) -> Study:
    """Slides painted, stored, and listed."""
    config = small_config(
        storage={name: str(folder / "root" / place) for name, place in PLACES.items()},
        tracking={"uri": tracker.uri, "model": folder.name, "experiment": "release"},
        gate={"approval": True},
        cluster={"cpus_per_worker": 1},
    )
    cohort = small_cohort(folder / "slides", splits)
    pairs = store_slides(cohort, folder / "root" / "patches", config)
    versions = look_at(cohort.slides, config.tiling)
    store = patch_store(config)
    statuses = [status for status in store.statuses(cohort.slides, known(versions)) if status is not None]
    ledger = write_ledger(store, outcomes(cohort.slides, statuses, versions), str(folder / "root" / "ledger" / "tile"))
    return Study(config, cohort, {slide.slide_id: stored.key for slide, stored in pairs}, ledger, tracker)
