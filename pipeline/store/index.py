"""Where each patch of a stored slide is: its position on the slide, and its bytes in a part or a pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageError
from pipeline.storage import files
from pipeline.store.packs import Place, read_index
from pipeline.store.parts import file_name

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PatchIndex:
    """Where each patch stands, in the slide and in the store. Arrays of length n, by row."""

    x: Ints
    """Level-0 px of the patch's left edge."""
    y: Ints
    """Level-0 px of its upper edge."""
    part: Ints
    offset: Ints
    """Absolute byte offset of the JPEG in its part."""
    length: Ints


def slide_index(uri: str, place: Place | None, n: int) -> PatchIndex:
    """That of a slide of n patches in a folder, or at a place in a pack; of a pack its patches have the part 0."""
    return folder_index(uri, n)[0] if place is None else packed_index(uri, place, n)


def part_uri(uri: str, place: Place | None, n: int, part: int) -> str:
    """The file of a slide's part, or the pack."""
    return uri if place is not None else files.join(uri, file_name(folder_index(uri, n)[1], part))


def read_rows(uri: str, place: Place | None, n: int, rows: Sequence[int] | Ints) -> list[bytes]:
    """The bytes of some of a slide's patches, in their order: one range read for each run of neighbours.

    Args:
        uri: of the slide's folder, or of the pack that it is in.
        place: in the pack.
        n: patches of the slide.
        rows: of them.

    Raises:
        StorageError: the store cannot be read.
    """
    index, wanted = slide_index(uri, place, n), np.asarray(rows, np.int64)
    found: dict[int, bytes] = {}
    for part in np.unique(index.part[wanted]).tolist():
        neighbours = runs(index, np.unique(wanted[index.part[wanted] == part]))
        ranges = [
            (int(index.offset[run[0]]), int(index.offset[run[-1]] + index.length[run[-1]] - index.offset[run[0]]))
            for run in neighbours
        ]
        for run, data in zip(neighbours, files.read_ranges(part_uri(uri, place, n, part), ranges), strict=True):
            start = index.offset[run[0]]
            for row in run.tolist():
                first = int(index.offset[row] - start)
                found[row] = data[first : first + int(index.length[row])]
    return [found[row] for row in wanted.tolist()]


@lru_cache(maxsize=8)  # slides: a batch comes back to the same few; 40 bytes a patch each
def folder_index(uri: str, n: int) -> tuple[PatchIndex, pa.Schema]:
    """That of a slide's folder, and its schema, which names the parts.

    Raises:
        StorageError: it is not of n patches.
    """
    table = folder_table(uri)
    if len(table) != n:
        raise StorageError(
            f"{uri}: {len(table)} patches lie there and the catalogue says {n}: the folder was replaced, or the plan "
            "made anew; run `pipeline store repair`, then again"
        )
    columns = (table.column(name).to_numpy().astype(np.int64) for name in PatchIndex.__annotations__)
    return PatchIndex(*columns), table.schema


def folder_table(uri: str) -> pa.Table:
    """The file itself."""
    return pq.read_table(pa.BufferReader(files.read_bytes(files.join(uri, "index.parquet"))))


@lru_cache(maxsize=8)  # slides: 16 bytes a patch each
def folder_origins(uri: str, _n: int) -> Ints:
    """(n, 2) left and top of a plan's patches, px of the level that is read."""
    table = folder_table(uri)
    return np.stack([table.column(name).to_numpy() for name in ("left", "top")], axis=1)


def packed_index(uri: str, place: Place, n: int) -> PatchIndex:
    """That of a slide of n patches in a pack; a plan's patches have the part -1."""
    columns = read_index(uri, place, n).astype(np.int64)
    x, y, length = columns[:, 1], columns[:, 2], columns[:, 3]
    ends = place.first + np.cumsum(length)
    return PatchIndex(x, y, np.full(n, -1 if place.planned else 0, np.int64), ends - length, length)


def runs(index: PatchIndex, rows: Ints) -> list[Ints]:
    """Cut ascending rows of one part where the next patch does not start at the end of the one before."""
    ends = index.offset[rows] + index.length[rows]
    return np.split(rows, np.flatnonzero(index.offset[rows][1:] != ends[:-1]) + 1)
