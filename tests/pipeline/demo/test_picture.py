from __future__ import annotations

import numpy as np
import pytest

from pipeline.demo.picture import draw_slide


def test_a_slide_is_a_pure_function_of_its_arguments() -> None:
    first, again = draw_slide((7, 1, 3), 1, 2), draw_slide((7, 1, 3), 1, 2)
    assert np.array_equal(first.rgbx, again.rgbx)
    assert first.lesions == again.lesions
    other = draw_slide((8, 1, 3), 1, 2)
    assert other.rgbx.shape != first.rgbx.shape or not np.array_equal(other.rgbx, first.rgbx)


@pytest.mark.parametrize("number", range(4))
def test_lesions_are_few_small_and_in_tissue(number: int) -> None:
    picture = draw_slide((0, 1, number), 1, 0)
    assert 2 <= len(picture.lesions) <= 6
    assert 0.005 < picture.lesion_share < 0.02
    white = np.median(picture.rgbx[:32, :32, :3].reshape(-1, 3), axis=0)
    for x, y, radius in picture.lesions:
        assert radius < 128  # 64 microns
        window = picture.rgbx[y - 60 : y + 61, x - 60 : x + 61, :3].astype(np.int16)
        assert (np.abs(window - white).max(2) > 20).mean() > 0.5


def test_a_negative_slide_has_none_but_the_same_kind_of_picture() -> None:
    pictures = [draw_slide((0, 1, number), 0, 0) for number in range(6)]
    assert all(not picture.lesions and picture.lesion_share == 0 for picture in pictures)
    assert len({picture.aggregates for picture in pictures}) > 1


def test_most_of_a_slide_is_white_glass() -> None:
    picture = draw_slide((0, 1, 5), 0, 1)
    height, width = picture.rgbx.shape[:2]
    assert 0.15 < picture.tissue_px / (height * width) < 0.35
    assert picture.rgbx[:40, :, :3].min() > 200


def test_stains_vary_between_slides() -> None:
    pictures = [draw_slide((0, 1, number), 0, 0) for number in range(4)]
    means = [picture.rgbx[..., :3].reshape(-1, 3)[::97] for picture in pictures]
    tissue = np.stack([pixels[pixels.min(1) < 200].mean(0) for pixels in means])
    assert tissue.std(0).max() > 5
