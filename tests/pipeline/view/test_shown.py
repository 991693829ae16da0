from __future__ import annotations

import numpy as np
import pytest

from pipeline.view.rasters import Squares
from pipeline.view.shown import ATTENTION, Patches

SQUARES = Squares(np.arange(4.0), np.arange(4.0), np.full(4, 3.0))


def test_the_top_patches_are_those_of_most_attention_in_order() -> None:
    patches = Patches(SQUARES, {ATTENTION: np.array([0.5, 2.0, 0.5, 1.0])}, np.array([False, True, False, True]))
    assert patches.top(3).tolist() == [1, 3, 0]
    assert patches.mass == pytest.approx(0.75)


def test_without_attention_there_is_no_top_and_no_mass() -> None:
    patches = Patches(SQUARES, {}, np.zeros(4, bool))
    assert patches.top(3).tolist() == []
    assert patches.mass is None
