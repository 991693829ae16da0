from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.slides.open import open_slide
from pipeline.slides.reader import SlideReader
from pipeline.view.pyramid import Step, steps
from pipeline.view.tiles import JPEG, PNG, tile
from tests.synth import RGB, tile_span, tissue_rgb, write_pyramid, zero_tile

WIDTH, HEIGHT, EDGE = 1013, 787, 240


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "a.tiff", tissue_rgb(WIDTH, HEIGHT), tile=EDGE, levels=2)


def _steps(reader: SlideReader) -> tuple[Step, ...]:
    return steps(reader.levels, [reader.native_tiles(number) for number in range(len(reader.levels))])


def _pixels(data: bytes) -> RGB:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_files_own_jpegs_go_out_byte_by_byte(slide: Path) -> None:
    with open_slide(slide) as reader:
        found = tile(reader, _steps(reader)[-1], 3, 2)
        offset, length = tile_span(slide, 0, 2 * -(-WIDTH // EDGE) + 3)
        assert found.media == JPEG
        assert found.data == slide.read_bytes()[offset : offset + length]


def test_what_is_made_is_the_mean_of_its_px_to_the_edge(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(1313, 1187), levels=1)
    with open_slide(path) as reader:
        half = _steps(reader)[-2]
        assert (half.raw, half.factor, half.width, half.height) == (False, 2, 657, 594)
        whole = reader.read(0, 0, 0, 1313, 1187)
        meant = np.asarray(Image.fromarray(whole).reduce(2)).astype(float)
        seen = _pixels(tile(reader, half, 1, 1).data).astype(float)
        assert seen.shape == (594 - 512, 657 - 512, 3)
        assert np.abs(seen - meant[512:, 512:]).mean() < 1.5
        np.testing.assert_allclose(meant[-1, 0], whole[-1, :2].mean(axis=0), atol=1)  # half a px is on the slide


def test_steps_far_below_a_level_are_read_by_eighths(tmp_path: Path) -> None:
    rgb = tissue_rgb(6000, 1237)
    path = write_pyramid(tmp_path / "flat.tiff", rgb, levels=1)
    with open_slide(path) as reader:
        coarsest = _steps(reader)[0]
        assert coarsest.factor == 16
        seen = np.concatenate(
            [_pixels(tile(reader, coarsest, column, 0).data) for column in range(coarsest.columns)], axis=1
        )
    meant = np.asarray(Image.fromarray(rgb).reduce(16))
    assert seen.shape == meant.shape
    assert np.abs(seen.astype(float) - meant).mean() < 4


def test_damage_is_seen_and_costs_its_tile_alone(slide: Path) -> None:
    zero_tile(slide, 0, 0)
    with open_slide(slide) as reader:
        finest = _steps(reader)[-1]
        found = tile(reader, finest, 0, 0)
        assert (found.media, found.lasting) == (PNG, False)
        assert _pixels(found.data).shape == (EDGE, EDGE, 3)
        assert _pixels(found.data)[5, EDGE // 2].tolist() == [128, 128, 128]
        assert tile(reader, finest, 1, 0).lasting


def test_where_the_slide_has_no_data_there_is_glass(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "sparse.tiff", tissue_rgb(500, 500), tile=EDGE, levels=1, sparse={8})
    with open_slide(path) as reader:
        assert (_pixels(tile(reader, _steps(reader)[-1], 2, 2).data) == 255).all()


def test_a_tile_that_is_not_there_is_an_index_error(slide: Path) -> None:
    with open_slide(slide) as reader, pytest.raises(IndexError):
        tile(reader, _steps(reader)[-1], 99, 0)
