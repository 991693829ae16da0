"""Where the patches of a file of features are on their slide, from all that is said of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.formats.feature_files import Patches, usual_step
from pipeline.tiling.guide import Guide

_UNKNOWN_PX = 256  # edge of a patch of which nothing is said at all, for pictures

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Placed:
    """Patches on their slide, in level-0 px."""

    corners: Ints
    """(n, 2) x, y."""
    extent: float
    step: float
    patch_px: int
    mpp: float | None
    """Microns per level-0 px; None where it is not known."""
    dimensions: tuple[int, int]


def place(told: Patches, n: int, slide: CohortSlide, spec: TilingConfig, guide: Guide) -> Placed:
    """Where the patches are, from what their file says, else the coordinates beside it.

    STAMP's microns become px by the cohort's `mpp`, else by that of the tiles. Where nothing says how large a patch is,
    it is as far as neighbours mostly are apart; where nothing says where they are, they stand in a square, row by row.

    Raises:
        SlideError: "features", they are of another tiling than the config's, or than the coordinates given beside.
    """
    _check_tiling(told, spec, slide.uri)
    edge = told.patch_px or (spec.patch_px if isinstance(spec.patch_px, int) else None)
    mpp, scale = slide.mpp, 1.0
    if told.unit == "um":
        mpp = mpp or told.target_mpp or spec.mpp
        if mpp is None:
            raise _bad(slide.uri, "its places are microns, and nothing says how many a px has; set tiling.mpp")
        scale = 1 / mpp
    extent, step = told.extent, told.step
    if guide.coords is not None:
        _check_same(told.corners, n, guide, slide.uri)
        corners, extent, step = guide.coords.corners.astype(np.float64), guide.coords.extent, guide.coords.step
        scale = 1.0
    elif told.corners is not None:
        corners = told.corners
    else:
        extent = step = float(edge or _UNKNOWN_PX)
        side = math.ceil(math.sqrt(n))
        corners = np.stack([np.arange(n) % side, np.arange(n) // side], axis=1).astype(np.float64) * extent
    near = usual_step(corners) or (edge or _UNKNOWN_PX) / scale
    extent, step = (extent or near) * scale, (step or near) * scale
    if mpp is None and told.target_mpp is not None and edge is not None:
        mpp = told.target_mpp * edge / extent
    whole = np.rint(corners * scale).astype(np.int64)
    size = told.dimensions or tuple(np.ceil(whole.max(axis=0) + extent).astype(int).tolist())
    return Placed(whole, extent, step, edge or round(extent), mpp, (size[0], size[1]))


def _check_tiling(told: Patches, spec: TilingConfig, uri: str) -> None:
    wrong = []
    if told.patch_px is not None and spec.patch_px not in ("native", told.patch_px):
        wrong.append(f"tiling.patch_px={told.patch_px}")
    target, asked = told.target_mpp, spec.mpp
    if target is not None and asked is not None and abs(target / asked - 1) > spec.mpp_tolerance:
        wrong.append(f"tiling.mpp={target:.4g}")
    if wrong:
        px = "" if told.patch_px is None else f"{told.patch_px} px "
        microns = "" if told.target_mpp is None else f"at {told.target_mpp:.4g} um a px"
        ours = f"tiling.patch_px={spec.patch_px} and tiling.mpp={spec.mpp}"
        what = f"features of another tiling: of patches of {px}{microns}, and the config says {ours}"
        raise _bad(uri, f"{what}; set {' '.join(wrong)}, or give features of the other tiling")


def _check_same(corners: npt.NDArray[np.float64] | None, n: int, guide: Guide, uri: str) -> None:
    assert guide.coords is not None
    if len(guide.coords.corners) != n:
        counts = f"{n} features, and the file of coordinates lists {len(guide.coords.corners)} patches"
        raise _bad(uri, f"{counts}: features of another tiling; make both of one")
    if corners is not None and not np.array_equal(np.rint(corners), guide.coords.corners):
        raise _bad(uri, "its coordinates differ from those in the file of coordinates: features of another tiling")


def _bad(uri: str, message: str) -> SlideError:
    return SlideError("features", f"{uri}: {message}")
