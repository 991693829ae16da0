from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config.compose import load_config
from pipeline.demo.cohort import MPP
from pipeline.demo.picture import SHARES, Extent, Picture, draw_slide

CONF = Path(__file__).resolve().parents[3] / "conf"


def test_a_slide_is_a_pure_function_of_its_arguments() -> None:
    first, again = draw_slide((7, 1, 3), 1, 2), draw_slide((7, 1, 3), 1, 2)
    assert np.array_equal(first.rgbx, again.rgbx)
    assert first.lesions == again.lesions
    other = draw_slide((8, 1, 3), 1, 2)
    assert other.rgbx.shape != first.rgbx.shape or not np.array_equal(other.rgbx, first.rgbx)


@pytest.mark.parametrize("extent", [Extent.FEW, Extent.MANY])
def test_lesions_lie_in_tissue_apart_from_each_other_and_cover_their_share(extent: Extent) -> None:
    for number in range(3):
        picture = draw_slide((0, 1, number), extent, 0)
        low, high = SHARES[extent]
        assert low - 0.006 <= picture.lesion_share <= high + 0.006  # of whole nests: half of one is 0.6% at most
        white = np.median(picture.rgbx[:32, :32, :3].reshape(-1, 3), axis=0)
        places = np.array(picture.lesions)
        apart = np.hypot(*(places[:, None, :2] - places[None, :, :2]).transpose(2, 0, 1))
        assert (apart + 1e9 * np.eye(len(places)) > 2 * places[0, 2] - 1).all()
        for x, y, radius in picture.lesions:
            assert radius < 64  # 32 microns
            window = picture.rgbx[int(y) - 30 : int(y) + 31, int(x) - 30 : int(x) + 31, :3].astype(np.int16)
            assert (np.abs(window - white).max(2) > 20).mean() > 0.5


@pytest.mark.parametrize("extent", [Extent.FEW, Extent.MANY])
def test_more_patches_show_lesions_than_the_demo_keeps(extent: Extent) -> None:
    config = load_config("demo", [], CONF)
    assert isinstance(config.tiling.patch_px, int)
    assert config.tiling.mpp is not None
    edge = round(config.tiling.patch_px * config.tiling.mpp / MPP)  # in px of level 0
    for number in range(4):
        shown = _lesion_patches(draw_slide((1, 1, number), extent, 0), edge)
        assert shown > config.model.select.memory


def _lesion_patches(picture: Picture, edge: int) -> int:
    """Patches of which lesions cover a quarter at least, which is a cell."""
    height, width = picture.rgbx.shape[0] // edge, picture.rgbx.shape[1] // edge
    y, x = np.ogrid[: height * edge, : width * edge]
    covered = np.zeros((height * edge, width * edge), np.bool_)
    for cx, cy, radius in picture.lesions:
        covered |= np.hypot(x - cx, y - cy) < radius
    return int((covered.reshape(height, edge, width, edge).mean((1, 3)) >= 0.25).sum())


def test_a_negative_slide_has_none_but_the_same_kind_of_picture() -> None:
    pictures = [draw_slide((0, 1, number), Extent.NONE, 0) for number in range(6)]
    assert all(not picture.lesions and picture.lesion_share == 0 for picture in pictures)
    assert len({picture.aggregates for picture in pictures}) > 1


def test_most_of_a_slide_is_white_glass() -> None:
    picture = draw_slide((0, 1, 5), 0, 1)
    height, width = picture.rgbx.shape[:2]
    assert 0.25 < picture.tissue_px / (height * width) < 0.36
    assert picture.rgbx[:40, :, :3].min() > 200


def test_stains_vary_between_slides() -> None:
    pictures = [draw_slide((0, 1, number), 0, 0) for number in range(4)]
    means = [picture.rgbx[..., :3].reshape(-1, 3)[::97] for picture in pictures]
    tissue = np.stack([pixels[pixels.min(1) < 200].mean(0) for pixels in means])
    assert tissue.std(0).max() > 5
