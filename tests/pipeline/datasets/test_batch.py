from __future__ import annotations

import numpy as np
import pytest
import simplejpeg
import torch

from pipeline.datasets.batch import Batch, decoded
from pipeline.errors import DamagedError


def batch(data: np.ndarray) -> Batch:
    """Rows 3, 4, ... of one slide."""
    n = len(data)
    return Batch(("k",) * n, np.arange(3, 3 + n), np.arange(n) * 5, np.arange(n) * 7, data)


def test_tensors_have_the_channels_first() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (2, 5, 5, 3), dtype=np.uint8)
    assert torch.equal(batch(pixels).tensor()[1, 2], torch.from_numpy(pixels[1, :, :, 2]))
    assert batch(np.ones((2, 7), np.float16)).tensor().shape == (2, 7)
    assert batch(pixels).table().to_pylist()[1] == {"key": "k", "row": 4, "x": 5, "y": 7}


def test_a_sheet_shows_patches_in_rows_of_eight() -> None:
    pixels = np.zeros((11, 4, 4, 3), np.uint8)
    pixels[9] = (10, 200, 30)
    sheet = batch(pixels).sheet()
    assert sheet.size == (8 * 98 - 2, 2 * 98 - 2)
    assert sheet.getpixel((98 + 40, 98 + 40)) == (10, 200, 30)
    assert "11 patches of 1 slides" in batch(pixels)._repr_html_()
    assert batch(pixels)._repr_html_().count("data:image/png;base64,") == 1


def test_features_are_no_pictures() -> None:
    some = batch(np.ones((2, 7), np.float32))
    with pytest.raises(TypeError, match="no pictures"):
        some.sheet()
    assert "2 features of 1 slides" in some._repr_html_()
    assert "img" not in some._repr_html_()


def test_what_cannot_be_decoded_is_damage() -> None:
    good = simplejpeg.encode_jpeg(np.zeros((4, 4, 3), np.uint8))
    assert decoded([good], 4, "here").shape == (1, 4, 4, 3)
    with pytest.raises(DamagedError, match="here: a patch cannot be decoded"):
        decoded([b"no jpeg"], 4, "here")
    with pytest.raises(DamagedError):
        decoded([good], 5, "here")
