"""How fast a kind of machine tiles, scores and trains, measured there on a few of the cohort's own slides, and kept."""

from __future__ import annotations

import logging
import os
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipeline import telemetry
from pipeline.bags.sources import LabelledSource, open_bag
from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.config.base import fingerprint
from pipeline.config.data import TilingConfig
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.inference.prediction import bag_scorer, predict_bag
from pipeline.ingest.source import opened
from pipeline.ingest.tiler import store_slide
from pipeline.model.build import build_model, build_optimizer
from pipeline.storage.files import join, list_names, read_json, write_json
from pipeline.store.patches import PatchStore
from pipeline.tiling.slide import effective_mpp, with_native_edge
from pipeline.tracking.tracker import Tracker
from pipeline.training.loop import train_steps
from pipeline.training.ranks import Ranks
from pipeline.training.session import Job, training_slides

log = logging.getLogger(__name__)

SAMPLE = 6
"""Slides that are measured on."""
_SECONDS = 20.0  # of training, after the first step


@dataclass(frozen=True)
class Measured:
    """One slide that was tiled for it."""

    area: float
    """Of the whole slide, in patches."""
    patches: int
    cpu_s: float
    read_bytes: float
    stored_bytes: float


@dataclass(frozen=True)
class Rates:
    """What one kind of machine needs; the JSON of `<root>/rates/<recipe>-<machine>.json`."""

    machine: str
    recipe: str
    """Fingerprint of tiling and network: others have other rates."""
    slides: tuple[Measured, ...]
    score_s: float
    """Of one worker, to score a patch without gradients and predict."""
    train_s: float
    """Of one worker, to train an epoch, a patch of its slides."""
    when: str

    @property
    def gpu(self) -> bool:
        """Whether a GPU did the network's part."""
        return "GPU" in self.machine


def machine_kind() -> str:
    """What this machine is, in the words by which its like are known."""
    names = {line.partition(":")[2].strip() for line in _cpu_lines()}
    cpu = f"{platform.machine()} {', '.join(sorted(names))}, {os.cpu_count()} CPUs"
    return f"{cpu}, GPU {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else cpu


def _cpu_lines() -> list[str]:
    return [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]


def recipe_of(config: Config) -> str:
    """What rates depend on, besides the machine."""
    model = config.model.model_dump(mode="json")
    precision = {name: getattr(config.train, name) for name in ("score_dtype", "score_batch", "threads", "source")}
    return fingerprint({"tiling": config.tiling.fingerprint(), "model": model, **precision})


def kept_rates(config: Config) -> list[Rates]:
    """What was measured for this recipe, on machines of one kind or several."""
    folder, start = join(config.storage.root, "rates"), f"{recipe_of(config)}-"
    names = [name for name in list_names(folder) if name.startswith(start) and name.endswith(".json")]
    found = [read_json(join(folder, name)) for name in sorted(names)]
    return [Rates(**{**one, "slides": tuple(Measured(**slide) for slide in one["slides"])}) for one in found]


def measure(config: Config, cohort: Cohort) -> Rates:
    """Tile, score and train on some slides of the cohort here, for a minute or two; kept below the root.

    Raises:
        StageError: none of them can be tiled.
    """
    chosen = sorted(cohort.slides, key=lambda slide: slide.slide_id)
    random.Random(config.seed).shuffle(chosen)
    with tempfile.TemporaryDirectory() as store:
        slides, measured = _tiled(chosen, config.tiling, store)
        if not slides:
            raise StageError("doctor --measure: none of the slides that were tried can be tiled; `tile` says why")
        score_s, train_s = _scored(config, slides), _trained(config, slides)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rates = Rates(machine_kind(), recipe_of(config), tuple(measured), score_s, train_s, now)
    name = f"{rates.recipe}-{fingerprint(rates.machine)}.json"
    write_json(join(config.storage.root, "rates", name), asdict(rates))
    return rates


def _tiled(
    chosen: Sequence[CohortSlide], spec: TilingConfig, store: str
) -> tuple[list[LabelledSource], list[Measured]]:
    slides: list[LabelledSource] = []
    measured: list[Measured] = []
    patches = PatchStore(store, spec.fingerprint())
    for slide in chosen:
        telemetry.drain()
        began = time.process_time()
        status = store_slide(slide, spec, store)
        cpu_s = time.process_time() - began
        if status.key is None:
            log.warning("doctor: %s is left out: %s", slide.slide_id, status.reason)
            continue
        stored = patches.slide(status.key)
        size = sum(path.stat().st_size for path in Path(patches.uri, status.key).iterdir())
        read = telemetry.drain().get("bytes.read", 0.0)
        measured.append(Measured(area_of(slide, spec), status.n_patches, cpu_s, read, size))
        slides.append((slide, stored))
        if len(slides) == SAMPLE:
            break
    return slides, measured


def area_of(slide: CohortSlide, spec: TilingConfig) -> float:
    """A slide's area in patches, tissue or not, by its header.

    Raises:
        SlideError: it cannot be opened, or its px have no size.
    """
    with opened(slide, spec) as reader:
        mpp = effective_mpp(reader.mpp, spec, slide.mpp)
        native = with_native_edge(reader, spec, mpp)
        scale = 1.0 if mpp is None or spec.mpp is None else mpp / spec.mpp
        stride = native.edge_px - native.overlap_px
        width, height = reader.dimensions
        return width * scale / stride * height * scale / stride


def _scored(config: Config, slides: Sequence[LabelledSource]) -> float:
    """Seconds a patch, once warm."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(config.train.threads)
    model = build_model(config).to(device).eval()
    scorer, spent = bag_scorer(model, config), 0.0
    for turn in range(2):  # the first one compiles, and fills caches
        began = time.perf_counter()
        for _, source in slides:
            bag = open_bag(source, threads=max(1, int(config.cluster.cpus_per_worker)), augment=None)
            predict_bag(model, bag, config, scorer)
        spent = time.perf_counter() - began if turn else spent
    return spent / sum(source.n_patches for _, source in slides)


def _trained(config: Config, slides: Sequence[LabelledSource]) -> float:
    """Seconds a patch, of the steps after the first: on every slide, with the encoder learning."""
    settings = config.train.model_copy(update={"explore_epochs": 0, "freeze_encoder_epochs": 0, "sampling": "all"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config).to(device)
    job = Job(config, tuple(slides), (), "", "", Tracker("", ""), "")
    steps = train_steps(
        model,
        build_optimizer(model, settings),
        training_slides(job),
        settings,
        config.model.select,
        seed=config.seed,
        start_epoch=0,
        ranks=Ranks(),
    )
    first, seconds, patches = next(steps), 0.0, 0
    for done in steps:
        seconds, patches = seconds + done.seconds, patches + done.patches
        if seconds > _SECONDS:
            break
    return seconds / patches if patches else first.seconds / first.patches
