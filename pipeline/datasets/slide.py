"""One committed slide of an opened store: its patches or features by row, by box or at random."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.datasets.batch import Batch, Ints, decoded
from pipeline.errors import StorageError
from pipeline.storage import files
from pipeline.store.index import PatchIndex, read_rows, slide_index
from pipeline.store.packs import Place, pack_uri, read_facts
from pipeline.tiling.cutting import split


@dataclass(frozen=True)
class Slide:
    """Small, picklable: the index and the bytes are read when they are asked for."""

    key: str
    """Names its content; of the same slide alike in every store."""
    uri: str
    """Its folder in the store, or the pack that it is in."""
    place: Place | None
    """In the pack."""
    n_patches: int
    sources: tuple[str, ...]
    """Files that became it; of features not known."""
    patch_px: int | None
    """Edge of a patch, px; None of features."""
    extent: float | None
    """Edge of a patch, level-0 px; None of features."""
    level: int | None
    """Pyramid level that was read; None of features."""
    dim: int | None
    """Numbers of a feature; None of patches."""
    dtype: str | None
    """float16 or float32; None of patches."""
    context_mpp: float | None = None
    """Microns per px of the second picture of each patch, which `around` gives; None: there is none."""

    def index(self) -> PatchIndex:
        """Position of every patch on the slide, and place of its bytes.

        Raises:
            StorageError: the slide is not there any more.
        """
        return slide_index(self.uri, self.place, self.n_patches)

    def table(self) -> pa.Table:
        """Position of every patch: row, x, y (level-0 px)."""
        index = self.index()
        return pa.table({"row": np.arange(self.n_patches), "x": index.x, "y": index.y})

    def facts(self) -> Mapping[str, Any]:
        """All that its commit says (`slide.json`)."""
        if self.place is not None:
            return read_facts(self.uri, self.place)
        facts: Mapping[str, Any] = files.read_json(files.join(self.uri, "slide.json"))
        return facts

    def payloads(self, rows: Sequence[int] | Ints) -> list[bytes]:
        """The stored bytes of `rows`, in their order: a JPEG each, or a vector's numbers, little-endian.

        With `context_mpp` two JPEGs, one after the other.

        Raises:
            IndexError: the slide has no such row.
            StorageError: the store cannot be read.
        """
        wanted = np.asarray(rows, np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.n_patches):
            raise IndexError(f"slide {self.key} has the rows 0 to {self.n_patches - 1}")
        return read_rows(self.uri, self.place, self.n_patches, wanted)

    def read(self, rows: Sequence[int] | Ints) -> Batch:
        """The patches or features of `rows`, in their order; errors as of `payloads`."""
        wanted, index = np.asarray(rows, np.int64), self.index()
        data = arrays(self.payloads(wanted), self.patch_px, self.dim, self.dtype, self.uri)
        return Batch((self.key,) * len(wanted), wanted, index.x[wanted], index.y[wanted], data)

    def around(self, rows: Sequence[int] | Ints) -> npt.NDArray[np.uint8]:
        """(n, p, p, 3): what lies around the patches of `rows`, as many px at `context_mpp` with the same centres.

        Raises:
            IndexError, StorageError: as `payloads`; the latter where there is none of it.
        """
        if self.context_mpp is None or self.patch_px is None:
            raise StorageError(f"{self.uri}: its patches were cut without surroundings; set tiling.context_mpp")
        return decoded([split(image)[1] for image in self.payloads(rows)], self.patch_px, self.uri)

    def rows_in(self, left: float, top: float, right: float, bottom: float) -> Ints:
        """Rows of the patches that share area with a box, level-0 px; of features those whose upper left corner is in.

        Features do not say how large their patches were.
        """
        index, extent = self.index(), self.extent
        if extent is None:
            inside = (left <= index.x) & (index.x < right) & (top <= index.y) & (index.y < bottom)
        else:
            width = np.minimum(index.x + extent, right) - np.maximum(index.x, left)
            height = np.minimum(index.y + extent, bottom) - np.maximum(index.y, top)
            inside = (width > 0) & (height > 0)
        return np.flatnonzero(inside)

    def read_box(self, left: float, top: float, right: float, bottom: float) -> Batch:
        """The patches of `rows_in`."""
        return self.read(self.rows_in(left, top, right, bottom))

    def sample(self, n: int, seed: int = 0) -> Batch:
        """Some of its rows at random, none twice, in ascending order; all where it has fewer."""
        drawn = np.random.default_rng(seed).choice(self.n_patches, min(n, self.n_patches), replace=False)
        return self.read(np.sort(drawn))


def slide_of(spec_uri: str, row: Mapping[str, Any], sources: Sequence[str]) -> Slide:
    """The slide of a row of the catalogue, in the folder of its spec."""
    packed = row["pack"] is not None
    edge, downsample = row["patch_px"], row["downsample"]
    return Slide(
        key=row["key"],
        uri=pack_uri(spec_uri, row["pack"]) if packed else files.join(spec_uri, row["key"]),
        place=Place(*json.loads(row["place"])) if packed else None,
        n_patches=row["n_patches"],
        sources=tuple(sources),
        patch_px=edge,
        extent=None if edge is None else edge * downsample,
        level=row["level"],
        dim=row["dim"],
        dtype=row["dtype"],
        context_mpp=row["context_mpp"],
    )


def arrays(
    payloads: Sequence[bytes], edge: int | None, dim: int | None, dtype: str | None, where: str
) -> npt.NDArray[Any]:
    """(n, edge, edge, 3) uint8 of JPEGs, or (n, dim) of vectors' bytes.

    Raises:
        DamagedError: a JPEG cannot be decoded.
        StorageError: the store holds neither.
    """
    if edge is not None:
        return decoded(payloads, edge, where)
    if dim is None or dtype is None:
        raise StorageError(f"{where}: neither patches nor features; open a store of either")
    return np.frombuffer(bytearray(b"".join(payloads)), np.dtype(dtype).newbyteorder("<")).reshape(-1, dim)
