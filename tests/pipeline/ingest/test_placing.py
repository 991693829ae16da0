from __future__ import annotations

import numpy as np
import pytest

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.formats.feature_files import Patches
from pipeline.ingest.placing import Placed, place
from pipeline.tiling.guide import Guide
from pipeline.tiling.interchange import Coordinates
from tests.pipeline.tiled import row

GRID = np.array([[0.0, 0.0], [1024.0, 0.0], [0.0, 1024.0]])
SPEC = TilingConfig(patch_px=512, mpp=0.5)


def placed(told: Patches, spec: TilingConfig = SPEC, guide: Guide = Guide(), mpp: float | None = None) -> Placed:  # noqa: B008
    return place(told, 3, row("a.h5", mpp), spec, guide)


def test_what_trident_says_is_all_that_is_needed() -> None:
    found = placed(Patches(GRID, "px", 1024, 1024, 512, 0.5, (3000, 2000)))
    assert np.array_equal(found.corners, GRID)
    assert (found.extent, found.step, found.patch_px, found.mpp) == (1024, 1024, 512, 0.25)
    assert found.dimensions == (3000, 2000)


def test_clam_says_places_alone() -> None:
    """A patch is as large as neighbours are apart; microns are the cohort's, or not known."""
    found = placed(Patches(GRID))
    assert (found.extent, found.step, found.patch_px, found.mpp) == (1024, 1024, 512, None)
    assert found.dimensions == (2048, 2048)
    assert placed(Patches(GRID), mpp=0.3).mpp == 0.3
    one = place(Patches(GRID[:1]), 1, row("a.h5"), SPEC, Guide())
    assert (one.extent, one.step) == (512, 512)


@pytest.mark.parametrize(("mpp", "scale"), [(None, 224 / 256), (0.5, 2), (0.25, 4)])
def test_stamp_s_microns_become_px_by_the_cohort_s_mpp_or_the_tiles_own(mpp: float | None, scale: float) -> None:
    told = Patches(GRID / 4, "um", 256.0, 256.0, 224, 256 / 224)
    found = placed(told, TilingConfig(patch_px=224, mpp=1.14), mpp=mpp)
    assert np.array_equal(found.corners, np.rint(GRID / 4 * scale))
    assert found.extent == pytest.approx(256 * scale)
    assert found.mpp == pytest.approx(1 / scale)
    with pytest.raises(SlideError, match=r"nothing says how many a px has; set tiling.mpp"):
        placed(Patches(GRID, "um", 256.0, 256.0), TilingConfig(patch_px=224, mpp=None))


def test_without_places_patches_stand_in_a_square() -> None:
    found = placed(Patches())
    assert found.corners.tolist() == [[0, 0], [512, 0], [0, 512]]
    assert (found.extent, found.dimensions) == (512, (1024, 1024))
    native = placed(Patches(), TilingConfig(patch_px="native"))
    assert (native.patch_px, native.extent) == (256, 256)


def test_coordinates_beside_the_features() -> None:
    guide = Guide(coords=Coordinates(GRID.astype(np.int64), 1024, 896, "trident"))
    for told in (Patches(), Patches(GRID)):
        found = placed(told, guide=guide)
        assert np.array_equal(found.corners, GRID)
        assert (found.extent, found.step) == (1024, 896)
    with pytest.raises(SlideError, match="its coordinates differ .*: features of another tiling"):
        placed(Patches(GRID + 1), guide=guide)
    with pytest.raises(SlideError, match="4 features, and the file of coordinates lists 3 patches"):
        place(Patches(), 4, row("a.h5"), SPEC, guide)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"patch_px": 256}, "set tiling.patch_px=512, or"),
        ({"mpp": 1.0}, "set tiling.mpp=0.5, or"),
        ({"patch_px": 256, "mpp": 0.25}, "set tiling.patch_px=512 tiling.mpp=0.5, or"),
    ],
)
def test_features_of_another_tiling_are_refused(changes: dict[str, float], remedy: str) -> None:
    told = Patches(GRID, "px", 1024, 1024, 512, 0.5)
    with pytest.raises(SlideError, match=f"a.h5: features of another tiling: of patches of 512 px at 0.5 um.*{remedy}"):
        placed(told, SPEC.model_copy(update=changes))
    placed(told, SPEC.model_copy(update={"patch_px": "native", "mpp": None}))
    placed(told, SPEC.model_copy(update={"mpp": 0.51}))
