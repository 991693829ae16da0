"""Features of a slide's patches as other tools keep them: where in the file each vector lies, and what it says of them.

- TRIDENT (`<name>.h5`): `features` (n, D) and `coords` (n, 2) int64, one row a chunk; attributes of `coords` as in its
  files of coordinates (`patch_size` at the target magnification, `patch_size_level0`, `level0_magnification`,
  `target_magnification`, `overlap`, `level0_width`, `level0_height`), of `features` `encoder`, `name`, `savetodir`
  (TRIDENT 0.2; `WSI.extract_patch_features` with `IO.save_h5`).
- CLAM (`h5_files/<name>.h5`): `features` and `coords` (int32), 32 rows a chunk, without attributes
  (`extract_features_fp.py` with `file_utils.save_hdf5`); `pt_files/<name>.pt`: the features alone.
- STAMP (`<name>.h5`): `feats` and `coords`, the latter in microns; attributes of the file `tile_size_um`,
  `tile_size_px`, `unit`, `extractor`, `stamp_version`, `feat_type` (STAMP 2; `preprocessing/__init__.py`).
- A `.pt` of one tensor (n, D), or of a mapping with `features` or `feats`, and perhaps `coords`.

None of them compresses, so a vector is a range of the file's bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import SlideError
from pipeline.formats.hdf5 import DAMAGE, MICRONS_AT_1X, datasets_of, load_h5py, patch_extent, row_offsets, written

Layout = Literal["trident", "clam", "stamp", "pt"]
Dtype = Literal["float16", "float32"]
Ints = npt.NDArray[np.int64]
Places = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.floating[Any]]

SUFFIXES = (".h5", ".pt")
_FEATURES = ("features", "feats")
_HISTORIC_PX, _HISTORIC_UM = 224, 256.0  # of STAMP's tiles before its files said what they are


@dataclass(frozen=True)
class Patches:
    """What a file says of its patches; None where it does not say."""

    corners: Places | None = None
    """(n, 2) x, y of the upper left corners, in `unit`."""
    unit: Literal["px", "um"] = "px"
    """px of level 0, or microns."""
    extent: float | None = None
    """Edge of a patch, in `unit`."""
    step: float | None = None
    """From one patch to the next where they stand side by side, in `unit`."""
    patch_px: int | None = None
    """Edge of a patch as the encoder saw it."""
    target_mpp: float | None = None
    """Microns per px of that."""
    dimensions: tuple[int, int] | None = None
    """Of the slide, level-0 px."""


@dataclass(frozen=True)
class FeatureFile:
    """The features of one slide."""

    layout: Layout
    offsets: Ints
    """(n,) where each vector begins in the file."""
    dim: int
    dtype: Dtype
    encoder: str | None
    """As the tool calls it; None where the file does not say."""
    patches: Patches

    @property
    def bytes_a_row(self) -> int:
        """Of one vector."""
        return self.dim * np.dtype(self.dtype).itemsize


def read_features(data: bytes, name: str) -> FeatureFile:
    """What a file of features holds; its vectors are looked at, and stay where they are.

    Args:
        data: the whole file.
        name: of it, whose suffix tells HDF5 from tensors.

    Raises:
        SlideError: "features", it is damaged, lacks what is needed, or holds numbers that are none.
        ConfigError: h5py is not installed.
    """
    if not data:
        raise SlideError("empty-file", f"{name}: zero bytes; copy the file again")
    found = _read_tensors(data, name) if name.endswith(".pt") else _read_hdf5(data, name)
    _check_numbers(found, data, name)
    return found


def _read_hdf5(data: bytes, name: str) -> FeatureFile:
    try:
        with load_h5py().File(io.BytesIO(data), "r") as file:
            datasets = datasets_of(file)
            key = _key(datasets, name)
            features, coords = datasets[key], datasets.get("coords")
            dtype = _checked_kind(features.shape, features.dtype.newbyteorder("=").name, f"{name}: `{key}`")
            if not features.dtype.isnative:
                raise _bad(name, f"`{key}` is big-endian; write it again as little-endian numbers")
            try:
                offsets = row_offsets(features)
            except ValueError as error:
                raise _bad(name, f"`{key}`: {error}") from error
            corners = None if coords is None else _corners(coords[:], features.shape, name)
            about = {} if coords is None else dict(coords.attrs)
            layout: Layout = "stamp"
            if key == "feats" or "stamp_version" in file.attrs:
                patches, encoder = _stamp(dict(file.attrs), corners, name), file.attrs.get("extractor")
            else:
                layout, patches = _by_corners(about, corners, name)
                encoder = features.attrs.get("encoder")
    except DAMAGE as error:
        raise _bad(name, f"no whole HDF5 file ({error}); its writer or its copy was stopped: make it again") from error
    return FeatureFile(layout, offsets, features.shape[1], dtype, None if encoder is None else str(encoder), patches)


def _read_tensors(data: bytes, name: str) -> FeatureFile:
    from torch import Tensor

    from ips.network.tensors import read_tensors  # loads torch, which tile workers do without

    try:
        found = read_tensors(io.BytesIO(data))
    except ValueError as error:
        raise _bad(name, f"{error}; save a tensor (n, D), or a mapping with `features` and `coords`") from error
    tensors = found if isinstance(found, Mapping) else {"features": found}
    features = tensors[_key(tensors, name)]
    if not isinstance(features, Tensor):
        raise _bad(name, f"it holds a {type(features).__name__}, not a tensor (n, D); save the tensor")
    dtype = _checked_kind(tuple(features.shape), str(features.dtype).removeprefix("torch."), name)
    start = data.find(features.contiguous().numpy().tobytes())
    if start < 0:  # compressed, or the tensor is a view of another order
        raise _bad(name, "its numbers do not lie in the file as they are; save it as torch.save(x.contiguous(), FILE)")
    n, dim = features.shape
    offsets = start + np.arange(n, dtype=np.int64) * dim * np.dtype(dtype).itemsize
    coords = tensors.get("coords")
    corners = None if coords is None else _corners(np.asarray(coords), (n, dim), name)
    return FeatureFile("pt", offsets, dim, dtype, None, Patches(corners))


def _key(found: Mapping[str, Any], name: str) -> str:
    key = next((key for key in _FEATURES if key in found), None)
    if key is None:
        there = ", ".join(f"`{one}` {tuple(getattr(item, 'shape', ()))}" for one, item in sorted(found.items()))
        raise _bad(name, f"neither `features` nor `feats` is in it, but {there or 'nothing'}; rename the right one")
    return key


def _checked_kind(shape: tuple[int, ...], kind: str, what: str) -> Dtype:
    if len(shape) != 2:
        raise SlideError("features", f"{what} has the shape {shape}, not (patches, D); write one vector a patch")
    if 0 in shape:
        raise SlideError("no-tissue", f"{what} has the shape {shape}: the tool found no patches on this slide")
    if kind not in ("float16", "float32"):
        raise SlideError("features", f"{what} holds {kind}; convert it to float16 or float32")
    return "float16" if kind == "float16" else "float32"


def _corners(coords: npt.NDArray[Any], shape: tuple[int, ...], name: str) -> Places:
    """Checked for what can be seen without a slide."""
    n = shape[0]
    if coords.shape == (2, n) and n != 2:
        raise _bad(name, f"`coords` is {coords.shape}: transposed; write it as ({n}, 2), x and y of each patch")
    if coords.ndim != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "iuf":
        raise _bad(
            name, f"`coords` is {coords.dtype} {coords.shape}, not numbers ({n}, 2); write x and y of each patch"
        )
    if len(coords) != n:
        more = "; the features look transposed" if shape[1] == len(coords) else ""
        raise _bad(name, f"{n} features and {len(coords)} coordinates: they are of two tilings{more}; make both again")
    corners = coords.astype(np.float64)
    if not np.isfinite(corners).all():
        raise _bad(name, "`coords` holds NaN or infinity; make the file again")
    return corners


def _by_corners(about: Mapping[str, Any], corners: Places | None, name: str) -> tuple[Layout, Patches]:
    """Of TRIDENT or CLAM, told apart by the attributes of the coordinates, of which CLAM's own files have none."""
    if "patch_size" not in about:
        return "clam", Patches(corners)
    tool, extent, step = patch_extent(about)
    if not extent > 0 or not step > 0:
        raise _bad(name, f"a patch of {extent:g} level-0 px, {step:g} px apart, makes no sense; patch it again")
    if tool == "clam":
        return "clam", Patches(corners, "px", extent, step)
    target, size = about.get("target_magnification"), None
    if "level0_width" in about and "level0_height" in about:
        size = int(about["level0_width"]), int(about["level0_height"])
        _check_inside(corners, size, name)
    microns = None if target is None else MICRONS_AT_1X / float(target)
    return "trident", Patches(corners, "px", extent, step, int(about["patch_size"]), microns, size)


def _check_inside(corners: Places | None, size: tuple[int, int], name: str) -> None:
    if corners is None or (corners < size).all():
        return
    what = "x and y are exchanged" if (corners[:, ::-1] < size).all() else "they are of another slide"
    outside = int((corners >= size).any(axis=1).sum())
    raise _bad(name, f"{outside} coordinates lie beyond the slide of {size[0]} x {size[1]} px: {what}; make it again")


def _stamp(about: Mapping[str, Any], corners: Places | None, name: str) -> Patches:
    if about.get("feat_type", "tile") != "tile":
        raise _bad(name, f"its features are of a {about['feat_type']}, not of tiles; give STAMP's tile features")
    extent, patch_px = about.get("tile_size_um"), about.get("tile_size_px")
    if extent is None and about.get("unit") == "um":
        extent = about.get("tile_size")
    if (
        extent is None
        and corners is not None
        and round(about.get("tile_size", usual_step(corners) or 0)) == _HISTORIC_PX
    ):
        extent, patch_px, corners = _HISTORIC_UM, _HISTORIC_PX, corners / _HISTORIC_PX * _HISTORIC_UM
    if extent is None:
        raise _bad(name, f"no `tile_size_um` among its attributes {sorted(about)}; extract it again with STAMP 2")
    edge, px = float(extent), None if patch_px is None else int(patch_px)
    return Patches(corners, "um", edge, edge, px, None if px is None else edge / px)


def usual_step(corners: Places) -> float | None:
    """The most frequent distance of neighbours in one row or column of (n, 2) corners; None where no two share one.

    Not the least: the last patches of a row may be shifted inwards.
    """
    found = []
    for along, across in ((0, 1), (1, 0)):
        order = np.lexsort((corners[:, along], corners[:, across]))
        gaps = np.diff(corners[order], axis=0)
        found.append(gaps[(gaps[:, across] == 0) & (gaps[:, along] > 0), along])
    steps, counts = np.unique(np.concatenate(found), return_counts=True)
    return float(steps[counts.argmax()]) if len(steps) else None


def _check_numbers(found: FeatureFile, data: bytes, name: str) -> None:
    """SlideError where a number is none; vectors that lie side by side are looked at together."""
    cuts = np.flatnonzero(np.diff(found.offsets) != found.bytes_a_row) + 1
    bad: list[int] = []
    for rows in np.split(np.arange(len(found.offsets)), cuts):
        vectors = np.frombuffer(data, found.dtype, len(rows) * found.dim, int(found.offsets[rows[0]]))
        bad += rows[~np.isfinite(vectors.reshape(len(rows), found.dim)).all(axis=1)].tolist()
    if bad:
        share = f"{len(bad)} of {len(found.offsets)} vectors, the first in row {bad[0]},"
        raise _bad(name, f"{share} hold NaN or infinity; extract them again, in float32 where float16 overflowed")


def trident_h5(vectors: Vectors, corners: Ints, coords: Mapping[str, Any], features: Mapping[str, Any]) -> bytes:
    """The file that TRIDENT would have written.

    Args:
        vectors: (n, D).
        corners: (n, 2) level-0 px.
        coords: attributes of the coordinates (`tiling.interchange.attributes`).
        features: attributes of the features.
    """
    arrays = {"features": vectors, "coords": corners.astype(np.int64)}
    return written(arrays, 1, features=features, coords=coords)


def clam_h5(vectors: Vectors, corners: Ints) -> bytes:
    """The file that CLAM would have written into h5_files/, but for numbers that are not float32. As `trident_h5`."""
    return written({"features": vectors, "coords": corners.astype(np.int32)}, 32)


def clam_pt(vectors: Vectors) -> bytes:
    """The file that CLAM would have written into pt_files/."""
    import torch  # which tile workers do without

    sink = io.BytesIO()
    torch.save(torch.from_numpy(np.array(vectors)), sink)
    return sink.getvalue()


def stamp_h5(vectors: Vectors, corners: Ints, mpp: float, extent: float, patch_px: int, encoder: str) -> bytes:
    """The file that STAMP would have written.

    Args:
        vectors: (n, D).
        corners: (n, 2) level-0 px.
        mpp: microns per level-0 px.
        extent: edge of a patch, level-0 px.
        patch_px: its edge as the encoder saw it.
        encoder: name.
    """
    about: dict[str, Any] = {"extractor": encoder, "unit": "um", "feat_type": "tile"}
    about |= {"tile_size_um": extent * mpp, "tile_size_px": patch_px}
    return written({"coords": corners * mpp, "feats": vectors}, None, file=about)


def _bad(name: str, message: str) -> SlideError:
    return SlideError("features", f"{name}: {message}")
