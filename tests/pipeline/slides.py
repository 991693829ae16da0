"""Slides, good and bad, for the tests of the tile stage, and what they leave in a store."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from pipeline.cohort import CohortSlide
from pipeline.config_data import TilingConfig
from tests.synth import cut, tissue_rgb, write_pyramid, zero_tile

RGB = tissue_rgb(613, 487)
SPEC = TilingConfig(patch_px=64, min_tissue=0.4)


def row(path: Path | str, mpp: float | None = None) -> CohortSlide:
    """A row of a cohort, named after its file."""
    name = Path(path).stem
    return CohortSlide(name, str(path), name, None, mpp, {"tumor": "1"}, {})


def spoilt(kind: str, good: Path, folder: Path) -> Path:
    """A copy of the good slide, or another one, that the tile stage refuses."""
    path = folder / f"{kind}.tiff"
    if kind == "blank":
        return write_pyramid(path, np.full((307, 411, 3), 244, np.uint8), levels=1)
    if kind == "no-mpp":
        return write_pyramid(path, RGB, levels=1, mpp=None)
    if kind == "absurd-mpp":
        return write_pyramid(path, RGB, levels=1, mpp=352.8)
    if kind == "coarse":
        return write_pyramid(path, RGB, levels=1, mpp=2.0)
    if kind == "tiny":
        return write_pyramid(path, tissue_rgb(61, 53), levels=1)
    if kind == "folder":
        path.mkdir()
        return path
    if kind != "none":
        shutil.copy(good, path)
    if kind == "zeroed":
        zero_tile(path, 0, 1)
    if kind in {"cut", "empty"}:
        cut(path, {"cut": 0.7, "empty": 0.0}[kind])
    if kind == "text":
        path.write_text("not a slide")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that is not a killed writer's leftover, by path."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
