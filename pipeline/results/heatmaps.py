"""The heatmaps of a prediction: drawn when all slides are predicted, on the one colour scale that they share then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipeline.inference.heatmap import Heatmap, highest, overlay_png
from pipeline.inference.prediction import SlidePrediction

GROUP_ROWS = 1 << 20
"""Rows of a Parquet row group at most: a slide's attention is written in groups of its own."""


@dataclass(frozen=True)
class Sketch:
    """What is kept of a predicted slide until its heatmap is drawn: some 100 bytes, and its thumbnail on the disk."""

    name: str
    """File name of the heatmap."""
    caption: tuple[str, ...]
    thumbnail: Path
    groups: range
    """Row groups of the attention file."""
    scale: float
    extent: float
    mpp: float | None
    top: float
    """Largest attention relative to uniform."""


class Sketchbook:
    """Sketches of slides as they are predicted.

    Args:
        scratch: folder for thumbnails.
        source: the model, for the captions.
    """

    def __init__(self, scratch: Path, source: str) -> None:
        self._scratch = scratch
        self._origin = f"{source}, {datetime.now(UTC):%Y-%m-%d}"
        self._groups = 0
        self.sketches: list[Sketch] = []

    def add(self, name: str, slide_id: str, values: Sequence[str], found: SlidePrediction) -> None:
        """A slide whose attention has just been written, `GROUP_ROWS` a group."""
        groups = range(self._groups, self._groups + -(-len(found.attention) // GROUP_ROWS))
        self._groups = groups.stop
        thumbnail = self._scratch / f"{len(self.sketches)}.png"
        Image.fromarray(found.thumbnail).save(thumbnail)
        top = highest([found.attention.column("attention").to_numpy()])
        caption = (slide_id, ", ".join(values), self._origin)
        self.sketches.append(Sketch(name, caption, thumbnail, groups, found.scale, found.extent, found.mpp, top))


def draw(sketches: Iterable[Sketch], attention: Path, folder: Path) -> None:
    """Write `folder/<name>` of each sketch, with the attention of a file that was written beside them."""
    sketches = list(sketches)
    top = max((sketch.top for sketch in sketches), default=1.0)
    with pq.ParquetFile(attention) as file:
        for sketch in sketches:
            rows = file.read_row_groups(list(sketch.groups), columns=["x", "y", "attention"])
            x, y, weights = (rows.column(name).to_numpy() for name in ("x", "y", "attention"))
            thumbnail = np.asarray(Image.open(sketch.thumbnail))
            slide = Heatmap(thumbnail, sketch.scale, x, y, sketch.extent, weights, sketch.mpp)
            (folder / sketch.name).write_bytes(overlay_png(slide, top, caption=sketch.caption))
