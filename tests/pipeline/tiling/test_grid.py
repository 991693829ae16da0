"""The grid: level, size and place of every patch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.slides.open import Level
from pipeline.tiling.grid import placed_grid, plan_grid
from pipeline.tiling.interchange import Coordinates

PYRAMID = (Level(5003, 3001, 1.0), Level(1250, 750, 4.0016), Level(312, 187, 16.04))


def spec(**fields: object) -> TilingConfig:
    return TilingConfig.model_validate({"patch_px": 100, **fields})


@pytest.mark.parametrize(
    ("target", "mpp", "level", "read"),
    [
        (0.5, 0.5, 0, 100),
        (0.5, 0.4785, 0, 100),  # 4.3% off: as it is
        (0.5, 0.4745, 0, 105),  # 5.1% off: resized
        (1.0, 0.25, 1, 100),
        (1.0, 0.5, 0, 200),  # level 1 has 2.0: the next finer is level 0
        (3.0, 0.5, 1, 150),
    ],
)
def test_the_level_for_the_mpp(target: float, mpp: float, level: int, read: int) -> None:
    grid = plan_grid(PYRAMID, spec(mpp=target), mpp)
    assert (grid.level, grid.read_px) == (level, read)
    assert grid.stride_px == read
    assert grid.patch_px == 100
    assert mpp * grid.scale == pytest.approx(target, rel=0.05)


def test_null_mpp_reads_level_0_whatever_its_mpp() -> None:
    grid = plan_grid(PYRAMID, spec(mpp=None), None)
    assert (grid.level, grid.read_px, grid.scale, grid.extent) == (0, 100, 1.0, 100.0)


def test_patches_are_never_enlarged() -> None:
    with pytest.raises(SlideError, match=r"0.5 microns per px, coarser than tiling.mpp=0.25") as caught:
        plan_grid(PYRAMID, spec(mpp=0.25), 0.5)
    assert caught.value.reason == "too-coarse"


def test_too_small() -> None:
    with pytest.raises(SlideError, match=r"312 x 187 px at level 0 hold no patch of 200 px") as caught:
        plan_grid(PYRAMID[2:], spec(mpp=None, patch_px=200), None)
    assert caught.value.reason == "too-small"


def test_cells_are_row_by_row() -> None:
    grid = plan_grid((Level(350, 201, 1.0),), spec(mpp=None), None)
    assert (grid.columns, grid.rows) == (3, 2)
    assert grid.cells().tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert grid.level0_origins(grid.cells())[-1].tolist() == [200, 100]


def test_planes() -> None:
    grid = plan_grid(PYRAMID, spec(mpp=3.0), 0.5)  # 150 px of level 1 for 100 px of patch
    cells = np.array([[3, 2]])
    assert grid.level_origins(cells).tolist() == [[450, 300]]
    assert grid.level0_origins(cells).tolist() == [[1801, 1200]]  # 450 * 4.0016 = 1800.72, 300 * 4.0016 = 1200.48
    assert grid.extent == pytest.approx(150 * 4.0016)
    assert grid.level0_boxes(cells)[0].tolist() == pytest.approx([1800.72, 1200.48, 2400.96, 1800.72])


@pytest.mark.parametrize("mpp", [0.2325, 0.2468, 0.25, 0.263, 0.299])
@pytest.mark.parametrize("levels", [(1.0,), (1.0, 2.0004), (1.0, 4.0016, 16.04)])
def test_imported_patches_show_what_the_file_says(mpp: float, levels: tuple[float, ...]) -> None:
    """TRIDENT takes all of these for 40x: patches of 100 px at 20x are 200 level-0 px."""
    pyramid = [Level(int(5003 / downsample), int(3001 / downsample), downsample) for downsample in levels]
    coords = Coordinates(np.array([[13, 7], [213, 7]]), 200.0, 200.0, "trident")
    grid, rejects = placed_grid(coords, pyramid, spec(mpp=0.5), mpp)
    assert (grid.level, grid.read_px) == ((1, 100) if levels[1:2] == (2.0004,) else (0, 200))
    assert grid.extent == pytest.approx(200, abs=0.1)
    assert (grid.patch_px, grid.columns, rejects) == (100, 2, {"outside": 0, "twice": 0})


@pytest.mark.parametrize(
    ("mpp", "target", "extent", "patch"), [(0.55, 0.5, 100, 100), (0.31, 0.5, 100, 100), (0.15, 0.125, 100, 100)]
)
def test_imported_patches_of_the_rims_of_a_magnification(mpp: float, target: float, extent: float, patch: int) -> None:
    coords = Coordinates(np.array([[13, 7]]), extent, extent, "trident")
    assert placed_grid(coords, PYRAMID, spec(mpp=target, patch_px=patch), mpp)[0].read_px == extent


@pytest.mark.parametrize(
    ("extent", "target", "mpp"),
    [
        (200, 0.5, 0.5),  # patches of 200 px, or of 100 px at 1.0
        (100, 1.0, 0.5),
        (130, None, None),  # level 0 is read as it is
        (95, 0.5, 0.5),  # would be enlarged
    ],
)
def test_imported_patches_of_another_size(extent: float, target: float | None, mpp: float | None) -> None:
    coords = Coordinates(np.array([[13, 7]]), extent, extent, "clam")
    with pytest.raises(SlideError, match=f"clam's patches are {extent} level-0 px wide") as caught:
        placed_grid(coords, PYRAMID, spec(mpp=target), mpp)
    assert caught.value.reason == "coords"


@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    patch=st.integers(8, 90),
    share=st.floats(0, 0.99),
    mpp=st.floats(0.1, 0.5),
)
def test_every_patch_lies_inside_and_none_is_left_out(
    width: int, height: int, patch: int, share: float, mpp: float
) -> None:
    fields = spec(patch_px=patch, overlap_px=int(share * patch), mpp=0.5)
    level = Level(width, height, 1.0)
    if min(width, height) < round(patch * 0.5 / mpp) and mpp < 0.475:
        with pytest.raises(SlideError, match="hold no patch"):
            plan_grid((level,), fields, mpp)
        return
    assume(min(width, height) >= patch)
    grid = plan_grid((level,), fields, mpp)
    last = grid.level_origins(np.array([[grid.columns - 1, grid.rows - 1]]))[0] + grid.read_px
    assert (last <= [width, height]).all()
    assert (last + grid.stride_px > [width, height]).all()
    assert grid.read_px >= patch
