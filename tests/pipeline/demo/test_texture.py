from __future__ import annotations

import numpy as np
import pytest

from pipeline.demo.texture import MARGIN, NUCLEI, TEXTURE, clouds, fibres, sprites


@pytest.mark.parametrize("texture", [clouds(60), clouds(6), fibres(0), fibres(1)])
def test_textures_tile_without_a_seam(texture: np.ndarray) -> None:
    assert texture.shape == (TEXTURE, TEXTURE)
    steps = np.abs(np.diff(texture.astype(np.int16), axis=0)).mean()
    seam = np.abs(texture[0].astype(np.int16) - texture[-1]).mean()
    assert seam < 1.5 * steps
    assert np.array_equal(texture.shape, texture.T.shape)


def test_textures_are_mid_grey_and_vary() -> None:
    for texture in (clouds(60), fibres(0), fibres(1)):
        assert 118 < texture.mean() < 138
        assert 30 < texture.std() < 60


@pytest.mark.parametrize("name", NUCLEI)
def test_nuclei_fit_their_margin_and_cover_what_they_stain(name: str) -> None:
    for sprite in sprites(name):
        height, width = sprite.stain.shape
        assert height == width
        assert height % 2 == 1
        assert height // 2 <= MARGIN
        assert sprite.covers.any()
        assert not sprite.covers[[0, -1]].any()


def test_lesion_nuclei_are_larger_and_less_regular_than_lymphocytes() -> None:
    areas = {name: np.array([sprite.covers.sum() for sprite in sprites(name)]) for name in NUCLEI}
    assert np.median(areas["lesion"]) > 1.5 * np.median(areas["lymphocyte"])
    assert areas["lesion"].std() > areas["lymphocyte"].std()
