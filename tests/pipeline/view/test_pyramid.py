from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.slides.reader import Level, NativeTiles
from pipeline.view.pyramid import GAP, MOST, SMALLEST, plain_steps, steps


def _levels(*sizes: tuple[int, int]) -> list[Level]:
    width, height = sizes[0]
    return [Level(w, h, (width / w + height / h) / 2) for w, h in sizes]


def _tiles(levels: list[Level], edge: int = 240) -> list[NativeTiles | None]:
    return [NativeTiles(edge, edge, -(-one.width // edge), -(-one.height // edge), "jpeg") for one in levels]


def test_levels_of_the_file_are_steps_and_gaps_between_them_are_filled() -> None:
    levels = _levels((40_003, 30_001), (10_000, 7_500), (2_500, 1_875))
    made = steps(levels, _tiles(levels))
    assert [(round(one.downsample), one.raw) for one in made] == [
        (128, False), (64, False), (32, False), (16, True), (8, False), (4, True), (2, False), (1, True),
    ]  # fmt: skip
    assert [(one.level, one.factor) for one in made[-2:]] == [(0, 2), (0, 1)]
    assert (made[-2].width, made[-2].height) == (20_002, 15_001)


@settings(deadline=None)
@given(st.integers(1, 300_000), st.integers(1, 300_000), st.lists(st.integers(2, 6), max_size=4))
def test_any_slide_has_steps_near_one_another_down_to_one_tile(width: int, height: int, ratios: list[int]) -> None:
    sizes = [(width, height)]
    for ratio in ratios:
        sizes.append((max(1, sizes[-1][0] // ratio), max(1, sizes[-1][1] // ratio)))
    levels = _levels(*sizes)
    made = steps(levels, _tiles(levels))
    assert made[-1].downsample == 1
    assert (made[-1].width, made[-1].height) == (width, height)
    coarsest = levels[-1]
    if max(coarsest.width, coarsest.height) <= SMALLEST * MOST:
        assert max(made[0].width, made[0].height) <= SMALLEST
    if min(coarsest.width, coarsest.height) > 8:  # below, rounding makes levels of any shape
        assert all(1 < coarse.downsample / fine.downsample <= GAP * 1.5 for coarse, fine in pairwise(made))
    for one in made:
        x, y, w, h = one.box(one.columns - 1, one.rows - 1)
        assert (x + w, y + h) == (one.width, one.height)
        assert w > 0
        assert h > 0


@pytest.mark.parametrize(
    ("edge", "codec", "raw"), [(256, "jpeg", 1), (64, "jpeg", 0), (4096, "jpeg", 0), (256, "other", 0)]
)
def test_tiles_go_out_as_they_are_where_they_are_jpegs_of_a_size_to_wait_for(edge: int, codec: str, raw: int) -> None:
    levels = _levels((3000, 2000))
    tiles = [NativeTiles(edge, edge, 1, 1, codec)]  # type: ignore[arg-type]
    assert steps(levels, tiles)[-1].raw == raw
    assert steps(levels, [None])[-1].raw is False


def test_layers_have_steps_of_powers_of_two() -> None:
    assert [one.downsample for one in plain_steps(2049, 700)] == [8, 4, 2, 1]
    assert [one.downsample for one in plain_steps(300, 200)] == [1]


def test_a_tile_that_is_not_there_is_an_index_error() -> None:
    step = plain_steps(513, 512)[-1]
    assert step.box(1, 0) == (512, 0, 1, 512)
    for place in ((2, 0), (0, 1), (-1, 0)):
        with pytest.raises(IndexError, match="no tile"):
            step.box(*place)
