"""Rings of masks, against shapely, which holds to the OGC's rules as QuPath's library does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from shapely import Polygon
from shapely.validation import explain_validity

from pipeline.tiling.outlines import Piece, area, pieces, placed, separated, straightened

MASKS = arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 11)), elements=st.booleans())
TOUCHING = np.array([[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]], bool)  # two holes that meet at a corner


def _polygon(piece: Piece) -> Polygon:
    found = Polygon(piece.shell, piece.holes)
    assert found.is_valid, explain_validity(found)
    assert found.exterior.is_ccw
    assert not any(hole.is_ccw for hole in found.interiors)
    return found


@given(MASKS)
@example(TOUCHING)
@example(np.eye(5, dtype=bool))
def test_any_mask_gives_valid_polygons_that_cover_it(mask: np.ndarray) -> None:
    whole = separated(mask)
    assert (whole >= mask).all()
    found = [_polygon(piece) for piece in pieces(mask)]
    assert len(found) == ndimage.label(whole)[1]
    assert sum(polygon.area for polygon in found) / 4 == whole.sum()
    for row, column in np.argwhere(whole):
        px = Polygon([(2 * column + a, 2 * row + b) for a, b in ((0, 0), (2, 0), (2, 2), (0, 2))])
        assert any(polygon.covers(px) for polygon in found)


@given(MASKS, st.floats(2, 30), st.floats(2, 30), st.booleans())
@example(TOUCHING, 2.0, 2.3, True)
def test_they_stay_valid_in_whole_px(mask: np.ndarray, x: float, y: float, cut: bool) -> None:  # noqa: FBT001
    for piece in pieces(mask, cut=cut):
        rings = [placed(ring, (x, y), (7, -3)) for ring in (piece.shell, *piece.holes)]
        _polygon(Piece(rings[0], tuple(rings[1:])))


@given(MASKS)
def test_no_two_px_meet_at_a_corner_alone(mask: np.ndarray) -> None:
    found = separated(mask)
    for row in range(mask.shape[0] - 1):
        for column in range(mask.shape[1] - 1):
            assert found[row : row + 2, column : column + 2].tolist() not in (
                [[True, False], [False, True]],
                [[False, True], [True, False]],
            )


def test_a_mask_without_such_corners_stays() -> None:
    mask = np.kron(np.array([[0, 1, 1], [0, 0, 1]], bool), np.ones((3, 2), bool))
    assert (separated(mask) == mask).all()
    assert pieces(np.zeros((3, 4), bool)) == []


def test_a_px_is_a_square_or_without_its_corners_a_diamond() -> None:
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    ((plain,), (cut,)) = pieces(mask), pieces(mask, cut=True)
    assert plain.shell.tolist() == [[4, 2], [6, 2], [6, 4], [4, 4], [4, 2]]
    assert sorted(cut.shell[:-1].tolist()) == [[4, 3], [5, 2], [5, 4], [6, 3]]
    assert area(plain.shell) == 4
    assert area(plain.shell[::-1]) == -4


def test_points_on_a_line_are_left_out() -> None:
    ring = np.array([[0, 0], [1, 0], [2, 0], [2, 1], [1, 1], [0, 1], [0, 0]])
    assert straightened(ring).tolist() == [[0, 0], [2, 0], [2, 1], [0, 1], [0, 0]]


@pytest.mark.parametrize("scale", [2.0, 2.5, 7.3])
def test_halves_are_rounded_alike(scale: float) -> None:
    """Else two sides of a px meet: 1.5 and 2.5 both become 2."""
    ring = np.array([[k, k % 2] for k in range(40)])
    assert (np.diff(np.floor(ring[:, 0] * scale / 2 + 0.5)) >= 1).all()
    assert len(placed(np.array([[1, 0], [2, 0], [2, 1], [1, 1], [1, 0]]), (2.0, 2.0))) == 5
