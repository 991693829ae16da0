"""How sharp a patch is: the variance of its Laplacian, which blur lowers because it takes the finest detail first.

Of the grey level (19595 R + 38470 G + 7471 B) / 65536 (ITU-R BT.601 as Pillow has it, rounded, 0..255) of the patch as
it is stored, so at its own microns per px and after its JPEG, and of the Laplacian L = up + down + left + right - 4
centre of every px that has all four neighbours, it is mean(L^2) - mean(L)^2 (Pech-Pacheco et al., 2000). All of it is
whole numbers up to the last division: every machine gives the same bits.

As a measure of focus it is relative. Stain, scanner, JPEG quality, microns per px and what the tissue is (fat and mucus
are smooth, lymphocytes are not) all move it by more than slight blur does.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

_EDGES = 2.0 ** (np.arange(1, 80) / 4) - 1
BINS = len(_EDGES) + 1
"""Of histograms: the first up to 0.19, each next one wider by 2^(1/4), the last up to 2^20, which no patch reaches."""


def sharpness(jpeg: bytes, width: int, height: int) -> float:
    """Variance of the Laplacian of an encoded patch, 0 to about 10^6.

    Args:
        jpeg: the patch.
        width: px of it, from the left, that lie on the slide: the rim of what is beyond would count as detail.
        height: likewise, from the top.

    Returns:
        0 where it is too small to have a px with four neighbours.

    Raises:
        ValueError: it cannot be decoded.
    """
    return laplacian_variance(simplejpeg.decode_jpeg(jpeg)[:height, :width])


def laplacian_variance(rgb: npt.NDArray[np.uint8]) -> float:
    """Of a picture (h, w, 3)."""
    grey = np.asarray(Image.fromarray(rgb).convert("L"), np.int16)
    inner = grey[1:-1, 1:-1]
    if not inner.size:
        return 0.0
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    flat = laplacian.ravel().astype(np.float64)  # whole numbers up to 1020: the sums are exact in any order
    total, squares = int(flat.sum()), int(np.square(flat).sum())  # a product of vectors would start threads
    return (flat.size * squares - total * total) / flat.size**2


def bin_of(value: float) -> int:
    """The bin of a histogram that a sharpness falls into."""
    return int(np.searchsorted(_EDGES, value, side="right"))


def histogram(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """(BINS,) how many of values (n,) fall into each bin."""
    return np.bincount(np.searchsorted(_EDGES, values, side="right"), minlength=BINS).astype(np.int64)


def bin_edge(number: float) -> float:
    """The sharpness at a place among the bins, which may lie within one."""
    return float(2.0 ** (number / 4) - 1)


def bin_place(value: float) -> float:
    """Where among the bins a sharpness lies; `bin_edge` the other way round."""
    return float(4 * np.log2(1 + value))
