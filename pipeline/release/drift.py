"""How new slides look beside those that a model learned from: what is compared, and by which tests.

Numbers, words and labels of every slide, and what the champion makes of it; permutation tests
(`inference.permutation`), whose p values are adjusted together (Holm).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image

from pipeline.bags.sources import LabelledSource, open_bag
from pipeline.bags.stain import STAINS
from pipeline.cohort.labels import Label
from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TaskConfig
from pipeline.config.recipe import Config
from pipeline.errors import StorageError
from pipeline.gate.evidence import Finding
from pipeline.inference.metrics import Bools, Floats
from pipeline.inference.permutation import (
    Statistic,
    kernel_distance,
    kolmogorov,
    permutation_test,
    total_variation,
)
from pipeline.inference.prediction import bag_scorer, load_model, predict_bag
from pipeline.inference.resampling import holm
from pipeline.results.tables import table_csv
from pipeline.storage.files import source_version
from pipeline.storage.scratch import scratch_folder
from pipeline.store.patches import PatchStore, StoredSlide
from pipeline.tracking.registry import fetch
from pipeline.tracking.tracker import Store

NUMBERS: Mapping[str, str] = {
    "mpp": "microns per px",
    "haematoxylin": "density of haematoxylin, mean",
    "haematoxylin spread": "density of haematoxylin, standard deviation",
    "eosin": "density of eosin, mean",
    "eosin spread": "density of eosin, standard deviation",
    "brightness": "brightness of tissue, 0 to 255",
    "tissue": "share of the slide that is tissue",
    "patches": "patches",
    "bad tiles": "share of patches that could not be decoded",
    "JPEG quality": "quality of the stored patches' JPEGs",
    "file size": "MB of the slide's file",
}
"""Name -> what it is, with its unit."""
WORDS: Mapping[str, str] = {"scanner": "vendor of the file's format"}

_PATCHES = 16  # of a slide, whose features are averaged
_COLOURED = 20  # difference of a px's colours, of 255, from which on it is tissue here
_LUMINANCE = np.array([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
])  # fmt: skip
"""Quantisation of brightness at quality 50 (ITU-T T.81, table K.1), row by row."""
_FEW = 2  # slides of a side that know a number, below which nothing is compared


@dataclass(frozen=True)
class Appearance:
    """One slide."""

    slide_id: str
    patient_id: str
    numbers: Mapping[str, float]
    """Of `NUMBERS`; NaN where it is not known."""
    words: Mapping[str, str]
    """Of `WORDS`."""
    labels: Mapping[str, Label | None]
    """Task -> label, None where missing."""
    thumbnail: bytes
    """JPEG."""


def appearances(store: PatchStore, slides: Sequence[CohortSlide], keys: Mapping[str, str]) -> list[Appearance]:
    """Of committed slides, as the store has them; the size of a file that cannot be reached any more is not known.

    Raises:
        StorageError: a slide is gone.
    """

    def look(slide: CohortSlide) -> Appearance:
        key = keys[slide.slide_id]
        return _appearance(slide, store.slide(key), store.facts(key))

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(look, slides))


def _appearance(slide: CohortSlide, stored: StoredSlide, facts: Mapping[str, Any]) -> Appearance:
    thumbnail = stored.thumbnail()
    numbers = {
        "mpp": _known(stored.mpp),
        **colours(np.asarray(Image.open(io.BytesIO(thumbnail)).convert("RGB"))),
        "tissue": _known(facts["evidence"]["mask"]["share"]),
        "patches": float(stored.n_patches),
        "bad tiles": stored.n_bad_tiles / max(1, stored.n_patches + stored.n_bad_tiles),
        "JPEG quality": _quality(stored, facts),
        "file size": _megabytes(slide.uri),
    }
    words = {"scanner": str(facts["vendor"])}
    return Appearance(slide.slide_id, slide.patient_id, numbers, words, dict(slide.labels), thumbnail)


def _known(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _megabytes(uri: str) -> float:
    try:
        return source_version(uri).size / 1e6
    except StorageError:
        return float("nan")


def colours(rgb: npt.NDArray[np.uint8]) -> dict[str, float]:
    """Stain and brightness of an image (h, w, 3) where it is coloured; NaN where nothing is."""
    pixels = rgb[np.ptp(rgb.astype(np.int16), axis=2) > _COLOURED].astype(np.float64)
    names = ("haematoxylin", "haematoxylin spread", "eosin", "eosin spread", "brightness")
    if not len(pixels):
        return dict.fromkeys(names, float("nan"))
    unit = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    amounts = -np.log((pixels + 1) / 256) @ np.linalg.inv(unit)
    mean, spread = amounts.mean(axis=0), amounts.std(axis=0)
    values = (mean[0], spread[0], mean[1], spread[1], pixels.mean())
    return dict(zip(names, map(float, values), strict=True))


def _quality(stored: StoredSlide, facts: Mapping[str, Any]) -> float:
    """Of the first patch; NaN where none is stored."""
    planned = stored.place.planned if stored.place is not None else not facts["parts"]
    return float("nan") if planned else jpeg_quality(*stored.payloads(np.array([0])))


def jpeg_quality(data: bytes) -> float:
    """The quality setting whose table of brightness a JPEG's is nearest to, by the formula of the IJG's library."""
    table = np.array(Image.open(io.BytesIO(data)).quantization[0], np.float64)  # type: ignore[attr-defined]
    scale = 100 * float(table.mean() / _LUMINANCE.mean())
    return (200 - scale) / 2 if scale <= 100 else 5000 / scale


@dataclass(frozen=True)
class View:
    """What a model makes of one slide."""

    embedding: npt.NDArray[np.float64]
    """(D,) mean over some of its patches."""
    values: Mapping[str, npt.NDArray[np.float64]]
    """Task -> (K,), its prediction."""


def views(store: Store, model_uri: str, config: Config, slides: tuple[LabelledSource, ...]) -> list[View]:
    """What a registered model makes of each slide; runs as a Ray task."""
    with scratch_folder() as scratch:
        _, folder = fetch(store, model_uri, scratch)
        model, _ = load_model(folder)
    model.eval()
    scorer, found = bag_scorer(model, config), []
    for _, source in slides:
        bag = open_bag(source, threads=torch.get_num_threads(), augment=None)
        rows = np.unique(np.linspace(0, len(bag) - 1, _PATCHES).round().astype(np.int64))
        with torch.inference_mode():
            patches = bag.take(torch.from_numpy(rows)).patches.to(model.mean.device)
            embedding = model.embed(patches).double().mean(dim=0).cpu().numpy()
        found.append(View(embedding, predict_bag(model, bag, config, scorer).values))
    return found


@dataclass(frozen=True)
class Sides:
    """All slides of both sides: new ones first."""

    new: int
    """How many are new."""
    slides: tuple[Appearance, ...]
    views: tuple[View, ...] | None
    """Of the same slides; None where no model looked at them."""

    @property
    def is_new(self) -> Bools:
        """(n,)."""
        return np.arange(len(self.slides)) < self.new


def find_drift(sides: Sides, tasks: Sequence[TaskConfig], seed: int) -> tuple[Finding, ...]:
    """Every respect in which both sides can be compared, those of the largest effect first."""
    compared = [one for one in _respects(sides, tasks) if one is not None]
    raw = [
        permutation_test(
            statistic, sides.is_new[known], [sides.slides[n].patient_id for n in np.flatnonzero(known)], seed
        )
        for _, known, statistic in compared
    ]
    adjusted = holm([p for _, p in raw])
    found = [
        Finding(name, int(sides.is_new[known].sum()), int((~sides.is_new[known]).sum()), round(p, 6), round(effect, 6))
        for (name, known, _), (effect, _), p in zip(compared, raw, adjusted, strict=True)
    ]
    return tuple(sorted(found, key=lambda one: (-one.effect, one.name)))


Respect = tuple[str, Bools, Statistic]


def _respects(sides: Sides, tasks: Sequence[TaskConfig]) -> list[Respect | None]:
    slides = sides.slides
    found = [_number(name, [one.numbers[name] for one in slides], sides) for name in NUMBERS]
    found += [_words(name, [one.words[name] for one in slides], sides) for name in WORDS]
    for task in tasks:
        labels = [one.labels.get(task.name) for one in slides]
        known = [None if label is None else str(label) for label in labels]
        found.append(_words(f"{task.name} missing", [str(label is None) for label in labels], sides))
        if task.kind in ("regression", "survival"):
            values = [float("nan") if label is None else float(label.rstrip("+")) for label in known]
            found.append(_number(f"{task.name} labels", values, sides))
        else:
            found.append(_words(f"{task.name} labels", known, sides))
    if sides.views is not None:
        found.append(_vectors("embeddings", np.stack([view.embedding for view in sides.views]), sides))
        found += [
            _vectors(f"{task.name} predictions", np.stack([view.values[task.name] for view in sides.views]), sides)
            for task in tasks
        ]
    return found


def _both(known: Bools, sides: Sides) -> bool:
    return min(int((known & sides.is_new).sum()), int((known & ~sides.is_new).sum())) >= _FEW


def _number(name: str, values: Sequence[float], sides: Sides) -> Respect | None:
    array = np.asarray(values, np.float64)
    known = ~np.isnan(array)
    return (name, known, kolmogorov(array[known])) if _both(known, sides) else None


def _words(name: str, values: Sequence[str | None], sides: Sides) -> Respect | None:
    known = np.array([value is not None for value in values], np.bool_)
    held = [value for value in values if value is not None]
    return (name, known, total_variation(held)) if _both(known, sides) else None


def _vectors(name: str, vectors: Floats, sides: Sides) -> Respect | None:
    known = np.ones(len(vectors), np.bool_)
    return (name, known, kernel_distance(vectors)) if _both(known, sides) else None


def unusual(sides: Sides) -> list[tuple[float, str]]:
    """How unusual each new slide is, and in which number: its largest distance from the old ones' median in spreads.

    A spread is 1.48 times the median distance, as of a normal distribution, and at least a hundredth of the median.
    """
    table = np.array([[one.numbers[name] for name in NUMBERS] for one in sides.slides])
    centre = _median(table[sides.new :])
    spread = np.maximum(1.4826 * _median(np.abs(table[sides.new :] - centre)), 1e-2 * np.abs(centre) + 1e-9)
    apart = np.nan_to_num(np.abs(table[: sides.new] - centre) / spread, nan=0.0)
    names = tuple(NUMBERS)
    return [(float(row.max()), names[int(row.argmax())]) for row in apart]


def drift_csv(sides: Sides) -> bytes:
    """One row a new slide, with its numbers."""
    new = sides.slides[: sides.new]
    columns: dict[str, Any] = {"slide_id": [one.slide_id for one in new], "patient_id": [one.patient_id for one in new]}
    columns |= {name: pa.array([one.numbers[name] for one in new], pa.float64(), from_pandas=True) for name in NUMBERS}
    found = unusual(sides)
    columns |= {"distance": [distance for distance, _ in found], "most_unusual_in": [name for _, name in found]}
    return table_csv(pa.table(columns))


def _median(table: Floats) -> Floats:
    """Of each column, of what is known."""
    columns = [column[~np.isnan(column)] for column in table.T]
    return np.array([np.median(column) if len(column) else np.nan for column in columns])
