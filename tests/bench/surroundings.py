"""What a second, coarser picture of each patch is worth, and what it costs: `python -m tests.bench.surroundings`.

`label`: slides whose answer no patch holds. Each has a large ring and three small lesions; one of these lies within the
ring (yes) or none does (no). A patch that shows a lesion never shows the ring, so patches of either class are alike.
Trained by the product's own loop on tiled slides, without `tiling.context_mpp` and with it, by seed; AUC of a test.

`cost`: CPU time and bytes of cutting one slide's patches, those encoded anew and the slide's own tiles.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ips.network.model import IPSModel
from ips.selection.select import gather, select
from pipeline.bags.augment import Augment
from pipeline.bags.patch_bag import PatchBag
from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.config.recipe import Config
from pipeline.ingest.tiler import store_slide
from pipeline.model.build import build_model, build_optimizer
from pipeline.slides.open import open_slide
from pipeline.store.patches import PatchStore, StoredSlide
from pipeline.tiling.slide import tile_slide
from pipeline.training.hands import Slides
from pipeline.training.loop import train_steps
from pipeline.training.ranks import Ranks
from tests.bench.lesions import mean_and_spread, stamp
from tests.synth import RGB, write_pyramid

WIDTH, HEIGHT, PATCH = 144, 128, 16
RADIUS, CLEAR = 30, 27  # px: of the ring, and from it to a lesion; a patch is 23 px from corner to corner
LESION, RING = (60, 20, 90), (150, 90, 60)
TASK = "enclosed"
Cohort = tuple[list[StoredSlide], list[int]]


def draw(seed: int, *, enclosed: bool) -> RGB:
    """A slide."""
    rng = np.random.default_rng(seed)
    rgb = rng.integers((170, 110, 150), (230, 170, 210), (HEIGHT, WIDTH, 3)).astype(np.uint8)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    centre = rng.uniform((RADIUS, RADIUS), (WIDTH - RADIUS, HEIGHT - RADIUS))
    away = np.hypot(x - centre[0], y - centre[1])
    rgb[np.abs(away - RADIUS) < 2] = RING
    for number in range(3):
        while True:
            place = rng.uniform((4, 4), (WIDTH - 4, HEIGHT - 4))
            distance = np.hypot(*(place - centre))
            inside = enclosed and number == 0
            if distance < RADIUS - CLEAR if inside else distance > RADIUS + CLEAR:
                break
        rgb[np.hypot(x - place[0], y - place[1]) < 3] = LESION
    return rgb


def config(context: float | None, epochs: int) -> Config:
    """A truncated ResNet-18, M = 8 of 72 patches."""
    return Config.model_validate(
        {
            "name": "surroundings",
            "cohort": {"uri": "none"},
            "tasks": [{"name": TASK, "column": "label"}],
            "tiling": {"patch_px": PATCH, "mpp": 0.5, "tissue": "none", "context_mpp": context},
            "model": {
                "encoder": {"stages": 2},
                "aggregator": {"heads": 8, "key_dim": 16, "hidden_dim": 512},
                "select": {"memory": 8, "chunk": 72},
                "mean": [0.75, 0.55, 0.7],
                "std": [0.1, 0.12, 0.1],
            },
            "train": {
                "epochs": epochs,
                "batch_size": 8,
                "lr": 5e-4,
                "weight_decay": 0.05,
                "warmup_epochs": 2,
                "explore_epochs": epochs // 2,
            },
        }
    )


def tiled(folder: Path, tiling: TilingConfig, slides: int, seed: int) -> Cohort:
    """Slides in a store, half of them of either class."""
    store, found, labels = PatchStore(str(folder / "store"), tiling.fingerprint()), [], []
    for number in range(slides):
        name, enclosed = f"{seed}-{number}", number % 2 == 1
        path = folder / f"{name}.tiff"
        if not path.exists():
            write_pyramid(path, draw(seed * 10_000 + number, enclosed=enclosed), tile=64, levels=3)
        status = store_slide(CohortSlide(name, str(path), name, None, None, {}, {}), tiling, str(folder / "store"))
        assert status.key is not None, status.error
        store.look_again()
        found.append(store.slide(status.key))
        labels.append(int(enclosed))
    return found, labels


def trained(cohort: Cohort, settings: Config, seed: int) -> IPSModel:
    """A network that has learned from the cohort."""
    stored, labels = cohort
    torch.manual_seed(seed)
    model = build_model(settings)

    def bag(index: int, epoch: int) -> PatchBag:
        return PatchBag([stored[index]], threads=1, augment=Augment(seed, epoch, stored[index].key))

    slides = Slides([s.n_patches for s in stored], [{TASK: float(label)} for label in labels], {TASK: "binary"}, bag)
    optimizer = build_optimizer(model, settings.train)
    for done in train_steps(
        model, optimizer, slides, settings.train, settings.model.select, seed=seed, start_epoch=0, ranks=Ranks()
    ):
        if done.step % 50 == 0:
            print(f"step {done.step}: loss {float(done.loss):.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def auc(model: IPSModel, cohort: Cohort, settings: Config) -> float:
    """Of a test."""
    scores = []
    for stored in cohort[0]:
        bag, select_by = PatchBag([stored], threads=1, augment=None), settings.model.select
        found = select(model, [bag], select_by.memory, select_by.chunk)
        scores.append(float(model(gather([bag], found, "cpu"))[TASK]))
    values, labels = torch.tensor(scores), torch.tensor(cohort[1])
    over = values[labels == 1].unsqueeze(1) - values[labels == 0]
    return float((over > 0).double().mean() + 0.5 * (over == 0).double().mean())


def label(seeds: Sequence[int], slides: tuple[int, int], epochs: int) -> dict[str, str]:
    """Test AUC by seed, each with cohorts of its own."""
    found: dict[str, list[float]] = {"without": [], "with": []}
    for seed in seeds:
        for name, context in (("without", None), ("with", 2.0)):
            settings = config(context, epochs)
            with tempfile.TemporaryDirectory() as folder:
                train, test = (tiled(Path(folder), settings.tiling, n, 2 * seed + k) for k, n in enumerate(slides))
                model = trained(train, settings, seed)
                found[name].append(auc(model, test, settings))
                print(name, seed, found[name][-1], "on what it learned from", auc(model, train, settings), flush=True)
    return {name: mean_and_spread(values) for name, values in found.items()}


def cost(slide: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Of cutting patches of a slide's level 0, written anew as a pyramid in tiles of 256 px; fastest of some rounds.

    CPU ms and bytes a patch, all patches taken, without the planning.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        with open_slide(slide) as reader:
            path = write_pyramid(Path(folder) / "a.tiff", reader.read(0, 0, 0, *reader.dimensions), tile=256, levels=4)
        kinds: dict[str, dict[str, object]] = {"encoded": {"overlap_px": 32}, "own tiles": {"edge": "drop"}}
        for name, fields in kinds.items():
            for context in (None, 1.0, 2.0, 4.0):
                spec = TilingConfig.model_validate({"tissue": "none", "context_mpp": context, **fields})
                spent = []
                for _ in range(rounds):
                    with open_slide(path) as reader:
                        tiling = tile_slide(reader, spec, 0.5)
                        began = time.process_time()
                        rows = list(tiling.rows())
                        spent.append(time.process_time() - began)
                found[f"{name}, {context}"] = {
                    "patches": len(rows),
                    "ms": round(1000 * min(spent) / len(rows), 2),
                    "bytes": round(sum(len(row.image) for row in rows) / len(rows)),
                }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("label", "cost"), default=("label", "cost"))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--slides", nargs=2, type=int, default=(64, 50))
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--slide", type=Path, help="of `cost`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    made: dict[str, object] = dict(stamp())
    if "label" in given.parts:
        made["label"] = label(given.seeds, tuple(given.slides), given.epochs)
    if "cost" in given.parts:
        made["cost"] = cost(given.slide, given.rounds)
    print(json.dumps(made))
