"""What QuPath opens of a prediction: the most attended patches, outlines of what is above some levels, every patch.

Places count from the slide's origin (`tiling.geojson`). Ids follow from the slide's id, the kind and the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import floor
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.inference.heatmap import patch_ends
from pipeline.tiling.geojson import collection, feature, square, write_collection
from pipeline.tiling.outlines import pieces

LEVELS = (2.0, 8.0, 32.0)
"""Of the outlines, in multiples of uniform attention: the same for every slide, so that two can be compared."""
TOP = 24
"""Patches that are listed one by one."""
_EDGES = 4096  # of the raster that outlines are traced in, along an axis: 64 MB of counts
_BATCH = 4096  # patches that are Python objects at a time
_PLACES = frozenset({"row", "x", "y", "size", "selected"})
_COLOURS = ((250, 193, 39), (229, 92, 48), (155, 36, 100))
_ORANGE, _GREY = (229, 92, 48), (130, 140, 150)

Numbers = npt.NDArray[Any]


def top_rows(score: Numbers, count: int = TOP) -> npt.NDArray[np.int64]:
    """Rows of the most attended patches, first ones first; of equal ones the lower row."""
    return np.argsort(-score, kind="stable")[:count]


def top_geojson(facts: Mapping[str, Any], table: pa.Table) -> bytes:
    """The most attended patches, numbered from 1, and outlines of each of `facts["levels"]`.

    Args:
        facts: what `slide.json` says.
        table: of the slide's maps.
    """
    x, y, score = (table[name].to_numpy() for name in ("x", "y", "score"))
    rows = top_rows(score)
    features = [_patch(facts, row, "top", f"#{rank}") for rank, row in enumerate(table.take(rows).to_pylist(), start=1)]
    left, top = facts["origin"]
    for level, colour in zip(facts["levels"], _COLOURS, strict=True):
        high, name = score >= level, f"Attention >= {level:g}x uniform"
        for number, rings in enumerate(outlines(x[high], y[high], facts["patch"], (left, top))):
            key = f"{facts['slide_id']}/level/{level:g}/{number}"
            features.append(feature(key, rings, "annotation", name, colour, measurements={"level": level}))
    return collection(features, ips={key: facts[key] for key in ("slide_id", "model", "maps", "levels")})


def write_all(file: BinaryIO, facts: Mapping[str, Any], table: pa.Table) -> None:
    """Every patch with its numbers, as gzip; in the memory of some thousand."""
    rows = (row for batch in table.to_batches(_BATCH) for row in batch.to_pylist())
    features = (_patch(facts, row, "patch") for row in rows)
    write_collection(file, features, ips={key: facts[key] for key in ("slide_id", "model", "maps")})


def _patch(facts: Mapping[str, Any], row: Mapping[str, Any], kind: str, label: str | None = None) -> dict[str, Any]:
    """The object of a row of the maps."""
    left, top = row["x"] - facts["origin"][0], row["y"] - facts["origin"][1]
    right, bottom = (floor(low + row["size"] + 0.5) for low in (left, top))
    numbers = {_named(name): float(f"{value:.7g}") for name, value in row.items() if name not in _PLACES}
    return feature(
        f"{facts['slide_id']}/{kind}/{row['row']}",
        [square(left, top, right, bottom)],
        "detection",
        "Selected patch" if row["selected"] else "Patch",
        _ORANGE if row["selected"] else _GREY,
        measurements={"row": row["row"], **numbers},
        label=label,
    )


def _named(column: str) -> str:
    """A measurement's name."""
    return "score (x uniform)" if column == "score" else column


def outlines(x: Numbers, y: Numbers, patch: float, corner: tuple[int, int]) -> Iterator[list[npt.NDArray[np.int64]]]:
    """Rings of the pieces that patches cover, shell first, to the px; where patches meet at a corner alone, with a
    patch more.

    Args:
        x: (n,) level-0 px of their left edges.
        y: (n,) of their upper edges.
        patch: their edge, level-0 px.
        corner: where the rings count from.
    """
    if not len(x):
        return
    (columns, lefts, rights), (rows, tops, bottoms) = (_lattice(low, patch) for low in (x, y))
    cover = np.zeros((len(rows), len(columns)), np.int32)
    for height, width, sign in ((tops, lefts, 1), (tops, rights, -1), (bottoms, lefts, -1), (bottoms, rights, 1)):
        np.add.at(cover, (height, width), sign)
    mask = cover.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0
    for piece in pieces(mask):
        yield [
            np.stack([columns[ring[:, 0] // 2] - corner[0], rows[ring[:, 1] // 2] - corner[1]], axis=1)
            for ring in (piece.shell, *piece.holes)
        ]


def _lattice(low: Numbers, patch: float) -> tuple[Numbers, Numbers, Numbers]:
    """All places at which patches begin or end along an axis; and where in them each does.

    Patches that stand anywhere, as a file said, are taken to a coarser raster where that would be too large.
    """
    step = 1
    while True:
        begins = low // step * step
        ends = np.floor(patch_ends(begins, max(patch, step)) + 0.5).astype(np.int64)
        edges = np.unique(np.concatenate([begins, ends]))
        if len(edges) <= _EDGES:
            return edges, np.searchsorted(edges, begins), np.searchsorted(edges, ends)
        step *= 2
