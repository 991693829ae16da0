"""Sums over squares of px are scipy's, far beyond the rim too."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.tiling import windows
from pipeline.tiling.windows import all_of, any_of, in_bands, sums

SHAPES = st.tuples(st.integers(1, 23), st.integers(1, 31))


@given(shape=SHAPES, edge=st.sampled_from([1, 3, 5, 7, 15]), beyond=st.sampled_from(["nearest", "nothing"]))
def test_sums_are_exact(shape: tuple[int, int], edge: int, beyond: Literal["nearest", "nothing"]) -> None:
    values = np.random.default_rng(3).integers(0, 766, shape).astype(np.int32)
    want = ndimage.convolve(values, np.ones((edge, edge), np.int32), mode=beyond.replace("nothing", "constant"))
    assert np.array_equal(sums(values, edge, beyond), want)
    floats = sums(values.astype(np.float32), edge, beyond)
    assert floats.dtype == np.float32
    assert np.array_equal(floats, want)


def shifted(values: np.ndarray, edge: int) -> np.ndarray:
    """Sums along the first axis: of each px first the one before, then the one after, nearest ones first."""
    total = values.copy()
    for shift in range(1, edge // 2 + 1):
        total[shift:] += values[:-shift]
        total[:-shift] += values[shift:]
        total[:shift] += values[:1]
        total[-shift:] += values[-1:]
    return total


@given(shape=SHAPES, edge=st.sampled_from([1, 3, 5, 7, 15]), seed=st.integers(0, 99))
def test_floats_are_added_in_one_order(shape: tuple[int, int], edge: int, seed: int) -> None:
    """A mask must not change by a px because a sum was rounded otherwise."""
    values = np.random.default_rng(seed).normal(0, 9, shape).astype(np.float32)
    assert np.array_equal(sums(values, edge), shifted(shifted(values, edge).T, edge).T)


@given(shape=SHAPES, edge=st.sampled_from([1, 3, 5, 9, 15]), share=st.floats(0, 1))
def test_any_and_all_are_the_greatest_and_the_least(shape: tuple[int, int], edge: int, share: float) -> None:
    mask = np.random.default_rng(4).random(shape) < share
    assert np.array_equal(any_of(mask, edge), ndimage.maximum_filter(mask, edge))
    assert np.array_equal(all_of(mask, edge), ndimage.minimum_filter(mask, edge))
    assert any_of(mask, edge).dtype == all_of(mask, edge).dtype == np.bool_


@pytest.mark.parametrize("height", [1, 12, 13, 14, 40])
def test_bands_put_together_are_the_whole(monkeypatch: pytest.MonkeyPatch, height: int) -> None:
    monkeypatch.setattr(windows, "BAND", 13)
    mask = np.random.default_rng(5).random((height, 17)) < 0.1
    other = np.random.default_rng(6).random((height, 17)) < 0.5
    some, few = in_bands(lambda one, two: [any_of(one, 15), one & two], mask, other)
    assert np.array_equal(some, any_of(mask, 15))
    assert np.array_equal(few, mask & other)
