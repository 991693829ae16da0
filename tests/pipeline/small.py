"""A tiny real cohort and model for the tests of what comes after training: plain images, a truncated ResNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.config.recipe import Config
from pipeline.ingest.group import Group
from pipeline.ingest.tiler import ReadSlide, read_slide, store_slide
from pipeline.model.build import build_model
from pipeline.model.folder import save_model
from pipeline.store.patches import PatchStore, StoredSlide

WIDTH, HEIGHT, PATCH = 211, 157, 32  # a grid of 6 x 4 whole patches


def small_config(**changes: object) -> Config:
    """Binary task on 32 px patches of plain images, M = 5."""
    plain: dict[str, object] = {
        "name": "small",
        "cohort": {"uri": "cohort.csv"},
        "tasks": [{"name": "tumour", "column": "label", "classes": ["no", "yes"]}],
        "tiling": {"patch_px": PATCH, "mpp": None, "min_tissue": 0.5, "edge": "drop"},
        "model": {
            "encoder": {"stages": 2},
            "aggregator": {"heads": 2, "key_dim": 4, "hidden_dim": 16},
            "select": {"memory": 5, "chunk": 7},
        },
        "evaluate": {"bootstrap": 50},
    }
    return Config.model_validate({**plain, **changes})


def write_slide(path: Path, seed: int) -> None:
    """Purple texture on white glass, cut asymmetrically; lossless."""
    generator = np.random.default_rng(seed)
    rgb = np.full((HEIGHT, WIDTH, 3), 244, np.uint8)
    rgb[8:, 5:170] = generator.integers((150, 60, 130), (200, 110, 190), size=(HEIGHT - 8, 165, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(path)


def write_sections(path: Path) -> Path:
    """A TIFF of two such slides, seeds 0 and 1; lossless."""
    pages = []
    for seed in (0, 1):
        write_slide(path, seed)
        with Image.open(path) as image:
            pages.append(image.copy())
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def write_model(folder: Path, config: Config) -> Path:
    """Seeded random weights with a steep attention, so that patches differ."""
    torch.manual_seed(3)
    model = build_model(config)
    save_model(folder, model.state_dict(), config)
    return folder


def write_cohort(folder: Path, labels: Sequence[str | None]) -> Cohort:
    """One slide a label, all in test; two slides a patient."""
    slides = []
    for number, label in enumerate(labels):
        path = folder / f"s{number}.png"
        write_slide(path, number)
        slides.append(CohortSlide(f"s{number}", str(path), f"p{number // 2}", "test", None, {"tumour": label}, {}))
    return Cohort(str(folder / "cohort.csv"), tuple(slides))


def store_slides(cohort: Cohort, root: Path, config: Config) -> list[tuple[CohortSlide, StoredSlide]]:
    """Tile and commit every slide."""
    store = PatchStore(str(root), config.tiling.fingerprint())
    pairs = []
    for slide in cohort.slides:
        status = store_slide(slide, config.tiling, str(root))
        assert status.key is not None, status.error
        pairs.append((slide, store.slide(status.key)))
    return pairs


def pack_slides(cohort: Cohort, root: Path, config: Config) -> list[tuple[CohortSlide, StoredSlide]]:
    """Tile the slides, and commit them in one pack."""
    store = PatchStore(str(root), config.tiling.fingerprint())
    group = Group(store, np.array([], "S32"))
    for number, slide in enumerate(cohort.slides):
        read, _ = read_slide(slide, Path(slide.uri).stat().st_size, config.tiling, str(root))
        assert isinstance(read, ReadSlide), read
        group.add(number, read)
    return [(cohort.slides[number], store.slide(str(status.key))) for number, status in [*group.commit()]]
