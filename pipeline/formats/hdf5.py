"""h5py where it is installed, and what it finds in a file's bytes.

It comes with `pip install "ips-pipeline[interchange]"` and is imported here alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError

Ints = npt.NDArray[np.int64]
MICRONS_AT_1X = 10.0  # um per px of a 1x scan: 20x is 0.5 and 40x is 0.25, the convention the tools stand on
DAMAGE = (OSError, LookupError, TypeError, ValueError, RuntimeError, ArithmeticError)
"""What h5py raises on a damaged file, or one of another kind."""


def load_h5py() -> ModuleType:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        problem = (
            "HDF5 files (tiling.coords, cohort.features, the cohort's columns coords and features, export) need h5py, "
            f"which is absent ({error}); run: pip install 'ips-pipeline[interchange]', on every node"
        )
        raise ConfigError("HDF5", [problem]) from error
    return h5py  # type: ignore[no-any-return]


def datasets_of(file: Any) -> dict[str, Any]:
    """Name -> dataset, of all that lie directly in an open file."""
    h5py = load_h5py()
    return {name: item for name, item in file.items() if isinstance(item, h5py.Dataset)}


def row_offsets(dataset: Any) -> Ints:
    """(n,) where each row of an open dataset (n, d) begins in the file, so that it can be read without h5py.

    Raises:
        ValueError: its rows do not lie in the file as they are: compressed, cut into columns, or never written.
    """
    n, bytes_a_row = dataset.shape[0], int(dataset.dtype.itemsize * np.prod(dataset.shape[1:]))
    if dataset.id.get_create_plist().get_nfilters():
        raise ValueError(f"it is stored compressed ({dataset.compression or 'filtered'}); h5repack -f NONE IN OUT")
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        if start is None:
            raise ValueError("its rows were never written; make the file again")
        return int(start) + np.arange(n, dtype=np.int64) * bytes_a_row
    rows = dataset.chunks[0]
    if dataset.chunks[1:] != dataset.shape[1:]:
        raise ValueError(f"its chunks {dataset.chunks} hold parts of rows; h5repack -l CONTI IN OUT")
    starts = np.full(-(-n // rows), -1, np.int64)

    def place(chunk: Any) -> None:
        starts[chunk.chunk_offset[0] // rows] = chunk.byte_offset

    dataset.id.chunk_iter(place)
    missing = np.flatnonzero(starts < 0)
    if len(missing):
        raise ValueError(
            f"{len(missing)} of its {len(starts)} chunks were never written, from row {missing[0] * rows} on: its "
            "writer was stopped; make the file again"
        )
    numbers = np.arange(n, dtype=np.int64)
    found: Ints = starts[numbers // rows] + numbers % rows * bytes_a_row
    return found


def patch_extent(attributes: Mapping[str, Any]) -> tuple[Literal["trident", "clam"], float, float]:
    """Whose attributes of `coords` these are, the edge of a patch and the distance of neighbours, in level-0 px.

    Raises:
        LookupError, TypeError, ValueError, ArithmeticError: they are neither tool's.
    """
    size = float(attributes["patch_size"])
    if "patch_size_level0" in attributes:
        extent = float(attributes["patch_size_level0"])
        return "trident", extent, extent * (1 - float(attributes.get("overlap", 0)) / size)
    # CLAM's own steps are not in the file; `custom_downsample` was in its files of 2020
    downsample = float(np.ravel(attributes["downsample"])[0]) * float(attributes.get("custom_downsample", 1))
    return "clam", size * downsample, size * downsample


def written(arrays: Mapping[str, npt.NDArray[Any]], chunk: int | None, **attributes: Mapping[str, Any]) -> bytes:
    """An HDF5 file of these datasets.

    Args:
        arrays: name -> (n, ...).
        chunk: rows of a chunk, in datasets that can grow; None: one contiguous block each.
        attributes: of each dataset by name; `file`: of the file itself.
    """
    sink = io.BytesIO()
    with load_h5py().File(sink, "w") as file:
        for name, array in arrays.items():
            grows = {} if chunk is None else {"maxshape": (None, *array.shape[1:]), "chunks": (chunk, *array.shape[1:])}
            dataset = file.create_dataset(name, shape=array.shape, dtype=array.dtype, **grows)
            dataset[:] = array
            dataset.attrs.update(attributes.get(name, {}))
        file.attrs.update(attributes.get("file", {}))
    return sink.getvalue()
