"""What is kept of a slide for people to look at: a thumbnail, the tissue mask, and some patches that were left out."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image
from scipy import ndimage

from pipeline.errors import BadTileError
from pipeline.slides.open import RGB, Overview, SlideReader
from pipeline.tiling.candidates import Candidates, Rejected
from pipeline.tiling.geojson import tissue_geojson
from pipeline.tiling.masks import Mask

THUMBNAIL_PX = 512
EXAMPLE_PX = 128  # edge of a rejected patch
QUALITY = 85
_OUTLINE = np.array([20, 120, 60], np.uint8)

THUMBNAIL = "thumbnail.jpg"
MASK = "mask.png"
REJECTED = "rejected.jpg"
OUTLINE = "tissue.geojson"


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of the slide."""

    rgb: RGB
    """(h, w, 3)."""
    scale: float
    """Level-0 px per thumbnail px."""

    @cached_property
    def jpeg(self) -> bytes:
        """As it is kept."""
        return _jpeg(self.rgb)


@dataclass(frozen=True)
class Evidence:
    """The files beside a slide's patches. Equal slides and specs give equal bytes."""

    files: Mapping[str, bytes]
    """mask.png, one bit a px over the whole slide; tissue.geojson, its outlines, which count from the corner of the
    slide's bounds as QuPath does; rejected.jpg, squares of 128 px from left to right, if any."""
    facts: Mapping[str, Any]
    """`mask`: level-0 px per px, share of tissue, share of that beyond the last patches, and where it was looked for
    the threshold and histogram of saturation; `rejected`: x, y (level 0), reason and tissue of each square."""


def thumbnail(overview: Overview, mask: Mask | None = None) -> Thumbnail:
    """A JPEG of at most 512 px, with the rim of a mask in green where one is given."""
    image = Image.fromarray(overview.rgb)
    share = min(1.0, THUMBNAIL_PX / max(image.size))
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    small = overview.rgb if size == image.size else np.asarray(image.resize(size, Image.Resampling.BOX))
    shown = small if mask is None else outlined(small, mask)
    return Thumbnail(shown, overview.scale * max(image.size) / max(size))


def outlined(rgb: RGB, mask: Mask) -> RGB:
    """A picture (h, w, 3) with the rim of a mask of any size over it in green."""
    height, width = rgb.shape[:2]
    tissue = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    drawn = rgb.copy()
    drawn[tissue & ~ndimage.binary_erosion(tissue)] = _OUTLINE
    return drawn


def gather_evidence(reader: SlideReader, overview: Overview, found: Candidates) -> Evidence:
    """The mask, and the rejected examples of `found` that can be read."""
    squares, listed = [], []
    for example in found.examples:
        try:
            squares.append(_square(reader, found, example))
        except BadTileError:  # whether it would have been kept is not known either
            continue
        ((x, y),) = found.grid.level0_origins(_cell(example)).tolist()
        listed.append({"x": x, "y": y, "reason": example.reason, "tissue": round(example.tissue, 4)})
    files = {MASK: mask_png(found.mask), OUTLINE: tissue_geojson(found.mask, reader.dimensions, reader.bounds[:2])}
    if squares:
        files[REJECTED] = _jpeg(np.concatenate(squares, axis=1))
    return Evidence(files, {"mask": mask_facts(overview, found), "rejected": listed})


def mask_facts(overview: Overview, found: Candidates) -> dict[str, Any]:
    """What `Evidence.facts` says of the mask."""
    mask: dict[str, Any] = {
        "scale": overview.scale,
        "share": round(float(found.mask.mean()), 6),
        "beyond": found.beyond,
    }
    if found.tissue is not None:
        mask |= {"threshold": found.tissue.threshold, "histogram": list(found.tissue.histogram)}
    return mask


def mask_png(mask: Mask) -> bytes:
    """A PNG of one bit a px."""
    sink = io.BytesIO()
    Image.fromarray(mask).save(sink, format="PNG")
    return sink.getvalue()


def read_mask_png(data: bytes) -> Mask:
    """What `mask_png` was given."""
    return np.asarray(Image.open(io.BytesIO(data), formats=("PNG",)).convert("1"))


def _square(reader: SlideReader, found: Candidates, example: Rejected) -> RGB:
    grid = found.grid
    ((x, y),) = grid.level_origins(_cell(example)).tolist()
    pixels = Image.fromarray(reader.read_over(grid.level, x, y, grid.read_px, grid.read_px))
    return np.asarray(pixels.resize((EXAMPLE_PX, EXAMPLE_PX), Image.Resampling.BOX))


def _cell(example: Rejected) -> np.ndarray:
    return np.array([[example.column, example.row]], np.int64)


def _jpeg(rgb: RGB) -> bytes:
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=QUALITY, colorspace="RGB")
    return bytes(data)
