"""Patch coordinates as other tools keep them: the HDF5 files of TRIDENT and of CLAM, read and written.

Both hold one dataset `coords` (n, 2), the level-0 px of the patches' upper left corners, and say in its attributes
what a patch is. TRIDENT (`<name>_patches.h5`): int64, one row a chunk; `patch_size` at the target magnification,
`patch_size_level0`, `level0_magnification`, `target_magnification`, `overlap` (target px), `name`, `savetodir`,
`level0_width`, `level0_height` (TRIDENT 0.2; its `IO.coords_to_h5`). It cuts by `patch_size` and the ratio of the
magnifications, which ours therefore state exactly, as floats where integers cannot.
CLAM (`<name>.h5`): int64, 32 rows a chunk; `patch_size` at `patch_level`, `downsample` of that level in x and y,
`downsampled_level_dim`, `level_dim`, `name`, `save_path` (`WholeSlideImage.process_contour` with
`file_utils.save_hdf5`).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import SlideError
from pipeline.formats.hdf5 import DAMAGE, MICRONS_AT_1X, load_h5py, patch_extent, written

Tool = Literal["trident", "clam"]
FeatureTool = Literal["trident", "clam", "stamp"]
Corners = npt.NDArray[np.int64]

NAME_BYTES = 255  # of a file's name, in most file systems
_STEM_BYTES = 200  # of it, for the slide's id
_UNSAFE = re.compile(r"[^\w. -]")
CHUNK: Mapping[Tool, int] = {"trident": 1, "clam": 32}  # rows, as each tool writes them


@dataclass(frozen=True)
class Coordinates:
    """Patches of one slide."""

    corners: Corners
    """(n, 2) x, y of the upper left corners, level-0 px."""
    extent: float
    """Edge of a patch, level-0 px."""
    step: float
    """From one patch to the next where they stand side by side, level-0 px."""
    tool: Tool


@dataclass(frozen=True)
class StoredGrid:
    """What a file says of a stored slide's patches."""

    name: str
    corners: Corners
    patch_px: int
    """Edge of a patch as the network sees it."""
    extent: float
    """Its edge, level-0 px."""
    overlap_px: int
    """In px of `patch_px`."""
    level: int
    """Pyramid level that is read, and its facts."""
    read_px: int
    level_size: tuple[int, int]
    level_downsample: float
    dimensions: tuple[int, int]
    """Level-0 px."""
    mpp: float | None
    """Microns per level-0 px."""


def require_h5py() -> None:
    """Tell now, and not at the first slide, that coordinates cannot be read or written here.

    Raises:
        ConfigError: h5py is not installed.
    """
    load_h5py()


def read_coordinates(data: bytes, source: str) -> Coordinates:
    """The patches that a file of TRIDENT or CLAM lists, told apart by its attributes.

    Raises:
        SlideError: "coords", it is neither, or what it holds makes no sense.
        ConfigError: h5py is not installed.
    """
    try:
        with load_h5py().File(io.BytesIO(data), "r") as file:
            dataset = file["coords"]
            corners, attributes = dataset[:], dict(dataset.attrs)
    except DAMAGE as error:  # or a group
        raise _bad(source, f"no HDF5 file with a dataset `coords` ({error}); give TRIDENT's or CLAM's file") from error
    if corners.ndim != 2 or corners.shape[1] != 2 or not np.issubdtype(corners.dtype, np.integer):
        raise _bad(source, f"`coords` is {corners.dtype} {corners.shape}, not integers (n, 2); write it again")
    try:
        tool, extent, step = patch_extent(attributes)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise _bad(
            source, f"the attributes of `coords` are neither TRIDENT's nor CLAM's ({error}); patch it again"
        ) from error
    if not extent > 0 or not step > 0:
        raise _bad(source, f"a patch of {extent:g} level-0 px, {step:g} px apart, makes no sense; patch it again")
    return Coordinates(corners.astype(np.int64), extent, step, tool)


def file_name(tool: Tool, name: str) -> str:
    """What the tool calls the file of a slide."""
    return f"{name}_patches.h5" if tool == "trident" else f"{name}.h5"


def file_stem(slide_id: str, *, told_apart: bool = False) -> str:
    """What the files of a slide are called: its id where that can be a file's name.

    Else what can, with 8 digits of the id's sha256: so ids that differ have names that differ, and the name follows
    from the id alone, without the cohort it stands in.

    Args:
        slide_id: any text.
        told_apart: with the digits in any case.
    """
    stem = _UNSAFE.sub("_", slide_id).strip(". ").encode()[:_STEM_BYTES].decode(errors="ignore")
    if stem and stem == slide_id and not told_apart:
        return stem
    return f"{stem or 'slide'}~{hashlib.sha256(slide_id.encode()).hexdigest()[:8]}"


def file_stems(slide_ids: Sequence[str]) -> dict[str, str]:
    """Slide id -> `file_stem`; the second of two that only differ in case is told apart, for disks that do not."""
    stems: dict[str, str] = {}
    taken: set[str] = set()
    for slide_id in slide_ids:
        stem = file_stem(slide_id)
        stems[slide_id] = file_stem(slide_id, told_apart=True) if stem.casefold() in taken else stem
        taken.add(stem.casefold())
    return stems


def file_names(slide_id: str, file: str) -> list[str]:
    """What the coordinates of a slide may be called: as `file_stems` names it, as its id, as its own file.

    Args:
        slide_id: the cohort's.
        file: name of the slide's file, without suffix, after which the tools name theirs.
    """
    stems = [file_stem(slide_id, told_apart=True), file_stem(slide_id), slide_id, file]
    names = dict.fromkeys(file_name(tool, stem) for stem in stems for tool in CHUNK if "/" not in stem)
    return [name for name in names if len(name.encode()) <= NAME_BYTES]


def coordinates_h5(grid: StoredGrid, tool: Tool, folder: str, target_mpp: float | None) -> bytes:
    """The file that the tool would have written of these patches.

    Args:
        grid: the stored slide.
        tool: whose file.
        folder: the tool's output folder, which its file names.
        target_mpp: microns per patch px.

    Raises:
        SlideError: "coords", TRIDENT's file names magnifications and the slide has no microns per px.
        ConfigError: h5py is not installed.
    """
    about = attributes(grid, tool, folder, target_mpp)
    return written({"coords": grid.corners.astype(np.int64)}, CHUNK[tool], coords=about)


def attributes(grid: StoredGrid, tool: Tool, folder: str, target_mpp: float | None) -> dict[str, Any]:
    """What the tool says of its coordinates; arguments and errors as `coordinates_h5`."""
    return _trident(grid, folder, target_mpp) if tool == "trident" else _clam(grid, folder)


def _trident(grid: StoredGrid, folder: str, target_mpp: float | None) -> dict[str, Any]:
    if grid.mpp is None or target_mpp is None:
        raise _bad(grid.name, "TRIDENT's file names magnifications, and tiling.mpp is null; export for CLAM")
    target = _whole(MICRONS_AT_1X / target_mpp)
    return {
        "patch_size": grid.patch_px,
        "patch_size_level0": round(grid.extent),
        # TRIDENT reads patch_size * level0_magnification / target_magnification level-0 px: what the slide's microns
        # say is only near that, where a level is read as it is or a patch has whole px
        "level0_magnification": _whole(target * round(grid.extent) / grid.patch_px),
        "target_magnification": target,
        "overlap": grid.overlap_px,
        "name": grid.name,
        "savetodir": folder,
        "level0_width": grid.dimensions[0],
        "level0_height": grid.dimensions[1],
    }


def _whole(magnification: float) -> float:
    """As an integer, as TRIDENT writes it, where it is one."""
    nearest = round(magnification)
    return nearest if abs(magnification - nearest) < 1e-9 * magnification else magnification


def _clam(grid: StoredGrid, folder: str) -> dict[str, Any]:
    return {
        "patch_size": grid.read_px,
        "patch_level": grid.level,
        "downsample": (grid.level_downsample, grid.level_downsample),
        "downsampled_level_dim": grid.level_size,
        "level_dim": grid.level_size,
        "name": grid.name,
        "save_path": folder,
    }


def _bad(source: str, message: str) -> SlideError:
    return SlideError("coords", f"{source}: {message}")
