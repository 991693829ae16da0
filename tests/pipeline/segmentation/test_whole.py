"""A network over a slide in tiles: exactly what it says of the whole slide in one piece, whatever the tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from pipeline.errors import SlideError
from pipeline.segmentation import whole
from pipeline.segmentation.whole import segmented
from pipeline.slides.open import open_slide
from pipeline.slides.reader import SlideReader
from tests.pipeline.segmentation.networks import REACH, Toy, Undefined, scripted, settings
from tests.synth import tissue_rgb, write_pyramid, zero_tile

MARGIN = 64  # px of glass around the whole


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted(Toy(), tmp_path_factory.mktemp("network") / "toy.pt")


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tiff", tissue_rgb(1013, 787), levels=2)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a pyramid."""
    return write_pyramid(tmp_path_factory.mktemp("slides") / "flat.tiff", tissue_rgb(1013, 787), levels=1)


def shrunk(rgb: npt.NDArray[np.uint8], factor: int) -> Image.Image:
    """Pillow rounds after each of its two passes; `reduce` would round once."""
    return Image.fromarray(rgb).resize((rgb.shape[1] // factor, rgb.shape[0] // factor), Image.Resampling.BOX)


def in_one_piece(reader: SlideReader, level: int, factor: int) -> npt.NDArray[np.bool_]:
    """The network's mask of a level that it sees shrunk by a whole factor, all at once."""
    size = reader.levels[level]
    width, height = -(-size.width // factor), -(-size.height // factor)
    rgb = np.full((height * factor, width * factor, 3), 255, np.uint8)
    rgb[: size.height, : size.width] = reader.read(level, 0, 0, size.width, size.height)
    small = np.full((-(-height // 4) * 4 + 2 * MARGIN, -(-width // 4) * 4 + 2 * MARGIN, 3), 255, np.uint8)
    small[MARGIN : MARGIN + height, MARGIN : MARGIN + width] = np.asarray(shrunk(rgb, factor))
    picture = torch.from_numpy(np.moveaxis(small.astype(np.float32) / np.float32(255), 2, 0)[None])
    with torch.inference_mode():
        found = Toy()(picture)[0].argmax(dim=0).numpy() == 1
    return np.asarray(found[MARGIN : MARGIN + height, MARGIN : MARGIN + width])


def mask(path: Path, network: Path, at: float = 0.5, px: int = 1013, **fields: Any) -> npt.NDArray[np.bool_]:
    """Of a slide of `at` microns per px, at the resolution of an overview; by default of one px a level-0 px."""
    with open_slide(path) as reader:
        return segmented(reader, at, settings(network, **fields), reader.overview(px))


@pytest.mark.parametrize(("tile", "overlap"), [(64, REACH), (96, 16), (128, 24), (512, 64), (400, REACH)])
def test_tiles_of_any_size_are_the_whole(flat: Path, network: Path, tile: int, overlap: int) -> None:
    with open_slide(flat) as reader:
        expected = in_one_piece(reader, 0, 2)
    found = mask(flat, network, mpp=1.0, tile=tile, overlap=overlap)  # level 0 at half its size
    assert 0.1 < expected.mean() < 0.9
    assert (found == np.kron(expected, np.ones((2, 2), bool))[:787, :1013]).all()


def test_too_little_overlap_shows(flat: Path, network: Path) -> None:
    """So the tiles above prove something."""
    whole_of_it = mask(flat, network, mpp=1.0, tile=512, overlap=64)
    assert (mask(flat, network, mpp=1.0, tile=64, overlap=0) != whole_of_it).any()
    assert (mask(flat, network, mpp=1.0, tile=64, overlap=4) != whole_of_it).any()


def test_the_coarsest_level_that_is_fine_enough_is_read(slide: Path, network: Path) -> None:
    with open_slide(slide) as reader:
        levels = reader.levels
        assert len(levels) == 2
        factor = levels[1].downsample
        expected = in_one_piece(reader, 1, 2)
        found = segmented(reader, 0.5, settings(network, mpp=0.5 * factor * 2), reader.overview(expected.shape[1]))
    assert found.shape == expected.shape
    assert (found != expected).mean() < 0.01


@pytest.mark.parametrize("px", [1013, 700, 101])
def test_the_mask_is_brought_to_the_overview(slide: Path, network: Path, px: int) -> None:
    full = mask(slide, network, mpp=1.0)
    found = mask(slide, network, px=px, mpp=1.0)
    assert found.shape == (round(787 * px / 1013), px)
    share = Image.fromarray(full.astype(np.uint8) * 255).resize(found.shape[::-1], Image.Resampling.BOX)
    assert ((np.asarray(share) >= 128) != found).mean() < 0.01


def test_a_mask_of_a_huge_slide_is_kept_in_small(slide: Path, network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = mask(slide, network, px=200, mpp=1.0)
    monkeypatch.setattr(whole, "MASK_PX", 333)
    assert (mask(slide, network, px=200, mpp=1.0) != full).mean() < 0.01


def test_how_much_is_read_at_once_does_not_show(slide: Path, network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = mask(slide, network, mpp=1.7)
    monkeypatch.setattr(whole, "BLOCK_PX", 101)
    assert (mask(slide, network, mpp=1.7) == full).all()


def test_eighths_show_the_same_tissue(flat: Path, network: Path) -> None:
    """Of JPEGs without a pyramid means of 8 x 8 px are read."""
    with open_slide(flat) as reader:
        assert reader.has_eighths(0)
        expected = in_one_piece(reader, 0, 8)
        found = segmented(reader, 0.5, settings(network, mpp=4.0), reader.overview(expected.shape[1]))
    height, width = min(len(found), len(expected)), expected.shape[1]
    assert (found[:height, :width] != expected[:height]).mean() < 0.03
    assert 0.1 < found.mean() < 0.9


def test_what_cannot_be_decoded_is_taken_from_the_overview(tmp_path: Path, network: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(1013, 787), levels=2)
    good = mask(path, network, mpp=1.0)
    zero_tile(path, 0, 6)
    found = mask(path, network, px=400, mpp=1.0)
    assert found.shape == (311, 400)
    assert np.abs(found.mean() - good.mean()) < 0.02


def test_a_slide_that_is_coarser_than_the_network_says_so(slide: Path, network: Path) -> None:
    with pytest.raises(SlideError, match=r"level 0 has 2.5 microns.* coarser than tiling.tissue_model.mpp=2;") as bad:
        mask(slide, network, 2.5, mpp=2.0)
    assert bad.value.reason == "too-coarse"
    assert mask(slide, network, 2.05, mpp=2.0).any()  # within rounding


def test_a_network_that_gives_no_numbers_says_where(slide: Path, tmp_path: Path) -> None:
    path = scripted(Undefined(), tmp_path / "undefined.pt")
    with pytest.raises(SlideError, match=r"gives no numbers .* at 0, 0 px of 2 microns") as bad:
        mask(slide, path)
    assert bad.value.reason == "tissue-model"
