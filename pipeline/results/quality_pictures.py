"""What the quality page shows of one slide: where tissue and patches are, and patches that were kept and left out."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.storage import files
from pipeline.store.patches import StoredSlide
from pipeline.tiling.evidence import EXAMPLE_PX, REJECTED, outlined, read_mask_png

KEPT = 6
QUALITY = 82
GRID_PX = 5  # of the picture: smaller patches are shown as a tint, without lines between them

_PATCH = np.array([31, 95, 190])

RGB = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PatchPicture:
    """One patch; x, y in level-0 px."""

    image: str
    """data: URI."""
    x: int
    y: int
    note: str


@dataclass(frozen=True)
class SlidePicture:
    """One slide."""

    overlay: str
    """data: URI of the thumbnail with the tissue's outline and the patches."""
    width: int
    height: int
    """Of the overlay, px."""
    kept: tuple[PatchPicture, ...]
    rejected: tuple[PatchPicture, ...]
    blurriest: tuple[PatchPicture, ...]
    """Of the patches, the least sharp first; empty where that was not measured."""
    min_sharpness: float | None
    """What a patch had to have; None where it was not measured."""


def picture(stored: StoredSlide) -> SlidePicture:
    """Read and draw.

    Raises:
        StorageError: a file of the slide cannot be read.
    """
    facts = stored.facts()
    thumbnail = np.asarray(Image.open(io.BytesIO(stored.thumbnail())).convert("RGB"))
    mask = read_mask_png(stored.mask())
    index = stored.index()
    corners = np.stack([index.x, index.y], axis=1)
    drawn = overlay(thumbnail, mask, corners, stored.extent, stored.thumbnail_scale)
    height, width = drawn.shape[:2]
    with_pixels = bool(index.part[0] >= 0)  # a plan of a slide to be streamed has no patches
    rows = np.unique(np.linspace(0, stored.n_patches - 1, KEPT if with_pixels else 0).round().astype(np.int64))
    kept = _patches(stored, dict.fromkeys(rows.tolist(), "kept"))
    least = facts["sharpness"]["least"] if with_pixels and "sharpness" in facts else []
    blurriest = _patches(stored, {row: figure(value) for row, value in least})
    rejected = _rejected(stored.uri, facts)
    return SlidePicture(_data_uri(drawn), width, height, kept, rejected, blurriest, facts["spec"].get("min_sharpness"))


def _patches(stored: StoredSlide, notes: Mapping[int, str]) -> tuple[PatchPicture, ...]:
    """Some of the slide's patches, by their rows, with what is said of each."""
    index, images = stored.index(), stored.payloads(list(notes))
    return tuple(
        PatchPicture(_data_uri(_resized(data)), int(index.x[row]), int(index.y[row]), note)
        for (row, note), data in zip(notes.items(), images, strict=True)
    )


def overlay(
    thumbnail: RGB, mask: npt.NDArray[np.bool_], corners: npt.NDArray[np.int64], extent: float, scale: float
) -> RGB:
    """The thumbnail with patches tinted and framed in blue, and the tissue's outline in green.

    Args:
        thumbnail: (h, w, 3).
        mask: of any size, over the whole slide.
        corners: (n, 2) level-0 px of the patches' upper left corners.
        extent: edge of a patch, level-0 px.
        scale: level-0 px per px of the thumbnail.
    """
    height, width = thumbnail.shape[:2]
    inside, lines = np.zeros((2, height, width), np.bool_)
    starts = np.clip(np.rint(corners / scale).astype(int), 0, [width - 1, height - 1])
    ends = np.clip(np.rint((corners + extent) / scale).astype(int), starts + 1, [width, height])
    framed = extent / scale >= GRID_PX
    for (left, top), (right, bottom) in zip(starts.tolist(), ends.tolist(), strict=True):
        inside[top:bottom, left:right] = True
        if framed:
            lines[top, left:right] = lines[top:bottom, left] = True
            lines[min(bottom, height - 1), left:right] = lines[top:bottom, min(right, width - 1)] = True
    drawn = thumbnail.astype(np.float64)
    drawn[inside] += 0.16 * (_PATCH - drawn[inside])
    drawn[lines] += 0.55 * (_PATCH - drawn[lines])
    return outlined(np.rint(drawn).astype(np.uint8), mask)


def figure(value: float) -> str:
    """A sharpness as people read it, to three digits where it is small."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rejected(uri: str, facts: Mapping[str, Any]) -> tuple[PatchPicture, ...]:
    listed = facts["evidence"]["rejected"]
    if not listed:
        return ()
    strip = np.asarray(Image.open(io.BytesIO(files.read_bytes(files.join(uri, REJECTED)))).convert("RGB"))
    return tuple(
        PatchPicture(
            _data_uri(strip[:, number * EXAMPLE_PX : (number + 1) * EXAMPLE_PX]),
            one["x"],
            one["y"],
            f"{int(100 * one['tissue'])}% tissue" if one["reason"] == "tissue" else one["reason"],
        )
        for number, one in enumerate(listed)
    )


def _resized(jpeg: bytes) -> RGB:
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    image.thumbnail((EXAMPLE_PX, EXAMPLE_PX), Image.Resampling.BOX)
    return np.asarray(image)


def _data_uri(rgb: RGB) -> str:
    sink = io.BytesIO()
    Image.fromarray(rgb).save(sink, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"
