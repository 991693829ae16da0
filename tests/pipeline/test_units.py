from __future__ import annotations

from pipeline.units import LevelPx, to_level0


def test_level_pixels_scale_by_the_downsample() -> None:
    assert to_level0(LevelPx(7), 2.0) == 14
    assert to_level0(LevelPx(3), 4.0001) == 12
