"""Pictures of a packed slide: little is kept of the whole, and the rest is drawn of its patches when it is asked for.

A thumbnail of 512 px takes more bytes than a picture of 512 px does, and would show what the patches hold anyway.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from pipeline.tiling.evidence import mask_png

QUALITY = 85
HALF = 128
KEPT_QUALITY = 60  # of what is kept: it is seen where there is no patch
LEAST_BYTES = 0.05  # a px of a picture that is not blank
LEAST_PX = 32  # longer edge: what is smaller is not halved

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


def small_overview(rgb: RGB, budget: int) -> bytes:
    """A JPEG of the whole picture (h, w, 3), half as large as often as it has more bytes than `budget`."""
    image = Image.fromarray(rgb)
    while LEAST_BYTES * image.width * image.height > budget and max(image.size) > LEAST_PX:
        image = _halved(image)
    while len(data := _jpeg(np.asarray(image), KEPT_QUALITY, "420")) > budget and max(image.size) > LEAST_PX:
        image = _halved(image)
    return data


def small_mask(mask: Mask, budget: int) -> bytes:
    """A PNG of one bit a px of the mask (h, w), half as large as often as it has more bytes than `budget`."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    while len(data := mask_png(np.asarray(image) >= HALF)) > budget and max(image.size) > LEAST_PX:
        image = _halved(image)
    return data


def _halved(image: Image.Image) -> Image.Image:
    return image.resize((-(-image.width // 2), -(-image.height // 2)), Image.Resampling.BOX)


def drawn(
    kept: bytes,
    dimensions: tuple[int, int],
    scale: float,
    images: Sequence[bytes],
    corners: npt.NDArray[np.int64],
    extent: float,
) -> bytes:
    """A slide's thumbnail as a JPEG: the overview that is kept of it, and its patches over it.

    Args:
        kept: the overview.
        dimensions: width and height of the slide, level-0 px.
        scale: level-0 px per px of the thumbnail.
        images: JPEGs of the patches.
        corners: (n, 2) of their upper left corners, level-0 px.
        extent: edge of a patch, level-0 px.
    """
    size = max(1, round(dimensions[0] / scale)), max(1, round(dimensions[1] / scale))
    canvas = Image.fromarray(simplejpeg.decode_jpeg(kept, colorspace="RGB")).resize(size, Image.Resampling.BILINEAR)
    starts, ends = np.rint(corners / scale).astype(int), np.rint((corners + extent) / scale).astype(int)
    for data, (left, top), (right, bottom) in zip(images, starts.tolist(), ends.tolist(), strict=True):
        patch = Image.open(io.BytesIO(data))
        patch.draft("RGB", (right - left, bottom - top))
        shown = patch.convert("RGB").resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BOX)
        canvas.paste(shown, (left, top))
    return _jpeg(np.asarray(canvas), QUALITY, "444")


def _jpeg(rgb: npt.NDArray[np.uint8], quality: int, subsampling: str) -> bytes:
    found = simplejpeg.encode_jpeg(
        np.ascontiguousarray(rgb), quality=quality, colorspace="RGB", colorsubsampling=subsampling
    )
    return bytes(found)
