"""The grid: level, size and place of every patch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.slides.open import Level
from pipeline.tiling.grid import Grid, cells_at, choose_level, placed_grid, plan_grid
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
        plan_grid(PYRAMID[2:], spec(mpp=None, patch_px=200, edge="drop"), None)
    assert caught.value.reason == "too-small"


EDGES = [
    ("inside", [0, 100, 200, 250], [0, 100, 101]),
    ("pad", [0, 100, 200, 300], [0, 100, 200]),
    ("drop", [0, 100, 200], [0, 100]),
]


@pytest.mark.parametrize(("edge", "lefts", "tops"), EDGES)
def test_cells_are_row_by_row(edge: str, lefts: list[int], tops: list[int]) -> None:
    grid = plan_grid((Level(350, 201, 1.0),), spec(mpp=None, edge=edge), None)
    assert (grid.columns, grid.rows) == (len(lefts), len(tops))
    assert grid.cells().tolist() == [[column, row] for row in range(len(tops)) for column in range(len(lefts))]
    assert grid.level0_origins(grid.cells()).tolist() == [[x, y] for y in tops for x in lefts]
    assert grid.level0_boxes(grid.cells())[-1].tolist() == [lefts[-1], tops[-1], lefts[-1] + 100, tops[-1] + 100]


@pytest.mark.parametrize("edge", ["inside", "pad"])
@pytest.mark.parametrize("size", [(71, 201), (350, 13), (1, 1), (100, 100)])
def test_where_a_slide_is_smaller_than_a_patch_one_stands_at_its_corner(edge: str, size: tuple[int, int]) -> None:
    grid = plan_grid((Level(*size, 1.0),), spec(mpp=None, edge=edge), None)
    origins = grid.level_origins(grid.cells())
    assert origins.min(axis=0).tolist() == [0, 0]
    assert (origins < size).all()
    assert (origins.max(axis=0) + 100 >= size).all()


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


def along(grid: Grid, axis: int) -> np.ndarray:
    """Corners of the patches of the first row (axis 0) or column, px of the level."""
    cells = np.zeros(((grid.columns, grid.rows)[axis], 2), np.int64)
    cells[:, axis] = np.arange(len(cells))
    return grid.level_origins(cells)


@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    patch=st.integers(8, 90),
    share=st.floats(0, 0.99),
    mpp=st.floats(0.1, 0.5),
    edge=st.sampled_from(["inside", "pad", "drop"]),
)
def test_every_px_has_a_patch_and_every_patch_a_place_of_its_own(
    width: int, height: int, patch: int, share: float, mpp: float, edge: str
) -> None:
    fields = spec(patch_px=patch, overlap_px=int(share * patch), mpp=0.5, edge=edge)
    level = Level(width, height, 1.0)
    if edge == "drop" and min(width, height) < choose_level((level,), fields, mpp)[1] * patch - 0.5:
        with pytest.raises(SlideError, match="hold no patch"):
            plan_grid((level,), fields, mpp)
        return
    assume(edge != "drop" or min(width, height) >= patch)
    grid = plan_grid((level,), fields, mpp)
    for axis, size in enumerate((width, height)):
        starts = along(grid, axis)[:, axis]
        assert starts[0] == 0
        assert (np.diff(starts) > 0).all()
        assert (starts < size).all()
        assert (np.diff(starts) <= grid.read_px).all()  # none between two patches
        end = starts[-1] + grid.read_px
        match edge:
            case "inside":
                assert end == max(size, grid.read_px)
            case "pad":
                assert size <= end < size + grid.read_px
                assert set(np.diff(starts)) <= {grid.stride_px}
            case _:
                assert size - grid.stride_px < end <= size
    assert grid.read_px >= patch


@given(
    size=st.tuples(st.integers(1, 900), st.integers(1, 900)),
    patch=st.integers(8, 90),
    share=st.floats(0, 0.99),
    downsample=st.floats(1.0, 17.3),
    edge=st.sampled_from(["inside", "pad"]),
)
@example(size=(1, 474), patch=65, share=0.75, downsample=1.9, edge="pad")  # 25 strides are 807.5 px, stored as 808
def test_column_and_row_are_known_from_the_corner(
    size: tuple[int, int], patch: int, share: float, downsample: float, edge: str
) -> None:
    """Of every patch, the last ones too, which may stand nearer than a stride: no two have one position."""
    fields = spec(patch_px=patch, overlap_px=int(share * patch), mpp=None, edge=edge)
    grid = replace(plan_grid((Level(*size, 1.0),), fields, None), downsample=downsample)
    for axis in (0, 1):
        corners = np.rint(along(grid, axis) * downsample).astype(np.int64)
        found = cells_at(corners, grid.stride_px * downsample)[:, axis]
        assert found.tolist() == list(range((grid.columns, grid.rows)[axis]))
