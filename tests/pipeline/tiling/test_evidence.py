"""What is kept of a slide to be looked at."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config.data import TilingConfig
from pipeline.slides.open import open_slide
from pipeline.tiling.evidence import EXAMPLE_PX, MASK, REJECTED, mask_png, read_mask_png
from pipeline.tiling.slide import tile_slide
from tests.synth import tissue_rgb, write_pyramid, zero_tile


def test_the_mask_and_the_rejected_patches_are_of_the_slide(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(1013, 787))
    with open_slide(path) as reader:
        evidence = tile_slide(reader, TilingConfig(patch_px=64), 0.5).evidence
    mask = read_mask_png(evidence.files[MASK])
    assert mask.shape == (398, 512)
    assert mask[int(0.4 * 398), int(0.35 * 512)]
    assert not mask[int(0.2 * 398), int(0.85 * 512)]
    strip = np.asarray(Image.open(io.BytesIO(evidence.files[REJECTED])))
    listed = evidence.facts["rejected"]
    assert strip.shape == (EXAMPLE_PX, EXAMPLE_PX * len(listed), 3)
    rgb = tissue_rgb(1013, 787)
    for number, one in enumerate(listed):
        patch = Image.fromarray(rgb[one["y"] :, one["x"] :][:64, :64]).resize((EXAMPLE_PX, EXAMPLE_PX))
        square = strip[:, number * EXAMPLE_PX : (number + 1) * EXAMPLE_PX].astype(int)
        assert np.abs(square - np.asarray(patch)).mean() < 12
        assert one["tissue"] < 0.25
    with open_slide(path) as reader:
        assert tile_slide(reader, TilingConfig(patch_px=64), 0.5).evidence == evidence


def test_examples_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(1213, 787), tile=608, levels=2)
    for number in range(4):
        zero_tile(path, 0, number)  # the overview is read from the level above
    with open_slide(path) as reader:
        evidence = tile_slide(reader, TilingConfig(patch_px=64, max_bad_tiles=1.0), 0.5).evidence
    assert evidence.facts["rejected"] == []
    assert REJECTED not in evidence.files


def test_a_mask_survives_its_png() -> None:
    mask = np.random.default_rng(0).random((37, 53)) < 0.3
    assert (read_mask_png(mask_png(mask)) == mask).all()
