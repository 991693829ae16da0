"""Pictures of one slide."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.results.quality_pictures import KEPT, overlay, picture
from tests.pipeline.small import small_config, store_slides, write_cohort


def test_patches_and_outline_stand_where_they_are() -> None:
    thumbnail = np.full((40, 60, 3), 200, np.uint8)
    mask = np.zeros((80, 120), bool)
    mask[20:60, 30:90] = True
    corners = np.array([[100, 200], [200, 200]])  # 10 px a patch
    drawn = overlay(thumbnail, mask, corners, 100.0, 10.0).astype(int)
    assert drawn.shape == thumbnail.shape
    assert (drawn[5, 5] == 200).all()
    tint, line, outline = drawn[21 + 4, 10 + 3], drawn[20 + 3, 10], drawn[10, 30]
    assert tint[2] > tint[0]
    assert line[2] - line[0] > tint[2] - tint[0]
    assert outline.tolist() == [20, 120, 60]
    assert (drawn[32, 12] == 200).all()  # below the patches, left of the tissue


def test_patches_too_small_for_lines_are_a_tint() -> None:
    drawn = overlay(np.full((9, 9, 3), 200, np.uint8), np.zeros((9, 9), bool), np.array([[0, 0], [20, 20]]), 20.0, 10.0)
    assert (drawn[:2, :2] == drawn[0, 0]).all()
    assert (drawn[:2, 2:] == 200).all()


def test_a_slide_has_kept_and_rejected_patches(tmp_path: Path) -> None:
    config = small_config()
    ((_, stored),) = store_slides(write_cohort(tmp_path, ["no"]), tmp_path / "store", config)
    shown = picture(stored)
    assert len(shown.kept) == KEPT
    assert (shown.kept[0].x, shown.kept[0].y) == (0, 0)
    assert shown.rejected
    assert all(one.note.endswith("% tissue") for one in shown.rejected)
    head, _, data = shown.overlay.partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (shown.width, shown.height)
