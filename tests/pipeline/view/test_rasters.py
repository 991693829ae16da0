from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.view.pyramid import plain_steps
from pipeline.view.rasters import Floats, Mask, Squares, painted, shade


def _slow(squares: Squares, values: Floats, downsample: float, box: tuple[int, int, int, int]) -> tuple[Floats, Mask]:
    """Px by px: which patches its middle lies in."""
    x, y, width, height = box
    mean, covered = np.zeros((height, width)), np.zeros((height, width), bool)
    for row in range(height):
        for column in range(width):
            middle_x, middle_y = (x + column + 0.5) * downsample, (y + row + 0.5) * downsample
            within = (squares.x <= middle_x) & (middle_x < squares.x + squares.size)
            within &= (squares.y <= middle_y) & (middle_y < squares.y + squares.size)
            if within.any():
                mean[row, column], covered[row, column] = values[within].mean(), True
    return mean, covered


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_px_is_the_mean_of_the_patches_that_its_middle_lies_in(data: st.DataObject) -> None:
    step = plain_steps(523, 11)[data.draw(st.integers(0, 1))]
    column = data.draw(st.integers(0, step.columns - 1))
    n = data.draw(st.integers(0, 12))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    size = draw.uniform(3, 60, n)
    squares = Squares(draw.integers(0, 522, n).astype(float), draw.integers(0, 10, n).astype(float), size)
    values = draw.normal(0, 1000, n)
    mean, covered = painted(squares, values, step, column, 0)
    slow_mean, slow_covered = _slow(squares, values, step.downsample, step.box(column, 0))
    np.testing.assert_array_equal(covered, slow_covered)
    np.testing.assert_allclose(mean, slow_mean, atol=1e-6)


def test_a_patch_smaller_than_a_px_is_seen() -> None:
    step = plain_steps(100_000, 90_000)[0]
    squares = Squares(np.array([70_001.0]), np.array([40_003.0]), np.array([7.0]))
    mean, covered = painted(squares, np.array([3.0]), step, 0, 0)
    assert covered.sum() == 1
    assert mean[covered] == 3


def test_a_mask_lies_where_it_is_on_the_slide() -> None:
    mask = np.zeros((5, 8), bool)
    mask[1, 6] = True
    step = plain_steps(800, 500)[-1]
    seen = np.concatenate([shade(mask, (800, 500), step, column, 0) for column in range(step.columns)], axis=1)
    rows, columns = np.nonzero(seen)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (600, 699, 100, 199)
    assert seen.shape == (500, 800)
