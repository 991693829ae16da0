"""Outlines of masks that every reader of polygons takes: rings that neither cross nor touch themselves or each other.

The rings of a mask run between its px. They touch where two px meet at a corner alone, which QuPath from 0.6 on, and
whatever else holds to the OGC's rules, refuses with the whole file. So such corners are filled first; after that each
point of the lattice lies on one ring at most, and what keeps the order of rows and columns, as scaling and rounding
to whole px that are not larger than the lattice's do, keeps the rings apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]
Points = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A piece of a mask: closed rings of (n, 2) x and y in half px from the mask's corner."""

    shell: Points
    """Anticlockwise where y points up (RFC 7946)."""
    holes: tuple[Points, ...]
    """The other way round."""


def separated(mask: Mask) -> Mask:
    """The mask (h, w) with px added until none meets another at a corner alone."""
    found = mask.copy()
    upper_left, upper_right = found[:-1, :-1], found[:-1, 1:]
    lower_left, lower_right = found[1:, :-1], found[1:, 1:]
    while True:
        falling = upper_left & lower_right & ~upper_right & ~lower_left
        rising = upper_right & lower_left & ~upper_left & ~lower_right
        if not (falling.any() or rising.any()):
            return found
        upper_right |= falling
        upper_left |= rising


def pieces(mask: Mask, *, cut: bool = False) -> list[Piece]:
    """The pieces of a mask (h, w) in which px meet by edges, in the order of their first px.

    Args:
        mask: True inside.
        cut: corners are cut by half a px, so that slopes are no stairs.
    """
    whole = separated(mask)
    labels, count = ndimage.label(whole)
    starts, steps, owners = _edges(whole, labels)
    width = whole.shape[1] + 1
    order = np.argsort(starts)
    starts, ends, owners = starts[order], (starts + steps)[order], owners[order]
    following = np.searchsorted(starts, ends).tolist()  # one edge leaves each point
    left = [True] * len(starts)
    found: list[tuple[list[Points], list[Points]]] = [([], []) for _ in range(count)]
    for first in range(len(starts)):
        if left[first]:
            ring, place = [], first
            while left[place]:
                left[place] = False
                ring.append(place)
                place = following[place]
            y, x = np.divmod(starts[ring], width)
            points = 2 * np.stack([x, y], axis=1)
            if cut:
                points = (points + np.roll(points, -1, axis=0)) // 2
            closed = straightened(np.concatenate([points, points[:1]]))
            found[owners[first] - 1][0 if area(closed) > 0 else 1].append(closed)
    return [Piece(shells[0], tuple(holes)) for shells, holes in found]


def area(ring: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> float:
    """Inside a closed ring (n, 2), in its own units; negative where it is clockwise (shoelace formula)."""
    x, y = ring.T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def straightened(ring: Points) -> Points:
    """A closed ring without the points that lie on a straight line between their neighbours."""
    points = ring[:-1]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    bends = points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
    return np.concatenate([bends, bends[:1]])


def placed(ring: Points, scale: tuple[float, float], corner: tuple[int, int] = (0, 0)) -> Points:
    """A ring in half px of a mask, in whole px of which `scale` (x, y; 2 at least) make one of the mask.

    `corner` is where these are counted from.
    """
    rounded = np.floor(ring * (np.asarray(scale) / 2) + 0.5).astype(np.int64)  # rint() would round 1.5 and 2.5 to 2
    return straightened(rounded - corner)


def _edges(mask: Mask, labels: npt.NDArray[np.int32]) -> tuple[Points, Points, Points]:
    """Where each edge between inside and outside begins, on the lattice of px corners, its step and its piece.

    Inside lies on the same side of all, so that shells go one way round and holes the other.
    """
    width = mask.shape[1] + 1
    rim = np.pad(mask, 1)
    inner = rim[1:-1, 1:-1]
    sides = (  # outside, where the edge begins from the px's upper left corner, and its step
        (rim[:-2, 1:-1], 0, 1),
        (rim[1:-1, 2:], 1, width),
        (rim[2:, 1:-1], width + 1, -1),
        (rim[1:-1, :-2], width, -width),
    )
    starts, steps, owners = [], [], []
    for beyond, offset, step in sides:
        row, column = np.nonzero(inner & ~beyond)
        starts.append(row.astype(np.int64) * width + column + offset)
        steps.append(np.full(len(row), step))
        owners.append(labels[row, column].astype(np.int64))
    return np.concatenate(starts), np.concatenate(steps), np.concatenate(owners)
