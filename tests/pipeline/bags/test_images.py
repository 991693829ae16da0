from __future__ import annotations

import csv
import hashlib
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bags.images import (
    SPRITE_PX,
    Grid,
    PastedBag,
    _generated,
    cohort_csv,
    megapixel_mnist,
    open_image,
    source_versions,
)
from pipeline.bags.mnist import Subset, read_digits
from pipeline.config.data import MegapixelConfig, TilingConfig
from pipeline.errors import SlideError
from tests.bench.scenes import megapixel_images
from tests.pipeline.digits import write_digits

GOLDEN = {  # of the official script, W = H = 1500, seed 0
    "train": {
        "digits": "3bc6baa56ed99be4",
        "majority": "44ea42d12a4cc96a",
        "places": "232defbb0c0e6bbf",
        "top": "be23ab57264da5ea",
        "strokes": "c5477927361dbf45",
        "stroke_places": "b62e587ae83fc661",
        "stroke_kinds": "8a8f4ab2626b5b5a",
        "image": "24265c2a19470bf5",
        "labels": [4, 9, 4],
    },
    "test": {
        "digits": "772a8bca2dbc50a4",
        "majority": "66e14aa724a4afe9",
        "places": "04acb9f5f5fe8abd",
        "top": "e449504e8cef84f6",
        "strokes": "fb81869d09e67fdf",
        "stroke_places": "0dd3fbfa8cbaace6",
        "stroke_kinds": "0c76f734df8ac28b",
        "image": "dfb07d6ba6bdef86",
        "labels": [5, 8, 0],
    },
}
PATCHES_OF_50 = TilingConfig(patch_px=50, mpp=None, tissue="none")


def _digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("subset", ["train", "test"])
def test_the_numbers_and_the_first_image_are_the_official_ones(shared_mnist: Path, subset: Subset) -> None:
    golden, data = GOLDEN[subset], MegapixelConfig(folder=str(shared_mnist))
    images = _generated(data, subset)
    labels = images.labels()
    for name in ("digits", "places", "strokes", "stroke_places", "stroke_kinds"):
        assert _digest(getattr(images, name)) == golden[name], name
    assert [_digest(labels["majority"]), _digest(labels["top"])] == [golden["majority"], golden["top"]]
    assert [int(labels[task][0]) for task in ("majority", "max", "top")] == golden["labels"]
    image = open_image(data, PATCHES_OF_50, f"{shared_mnist}#{subset}-0")
    rows = image.bag().take(torch.arange(900)).patches.view(30, 30, 50, 50)
    assert _digest(rows.permute(0, 2, 1, 3).reshape(1500, 1500).numpy()) == golden["image"]


def _drawn(sprites: Any, places: Any, height: int, width: int) -> torch.Tensor:
    """The dense image, as the paper's code makes it."""
    canvas = np.zeros((height, width), np.uint8)
    for sprite, (y, x) in zip(sprites, places, strict=True):
        canvas[y : y + SPRITE_PX, x : x + SPRITE_PX] = sprite
    return torch.from_numpy(canvas)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(60, 180),
    width=st.integers(60, 180),
    patch=st.integers(3, 59),
    share=st.integers(1, 100),
    sprites=st.integers(0, 12),
    size=st.integers(1, 97),
    seed=st.integers(0, 999),
)
def test_patches_are_those_of_the_drawn_image(
    height: int, width: int, patch: int, share: int, sprites: int, size: int, seed: int
) -> None:
    stride = max(3, patch * share // 100)
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (sprites, SPRITE_PX, SPRITE_PX), dtype=np.uint8)
    bounds = np.array([height, width]) - SPRITE_PX
    places = np.where(rng.random((sprites, 2)) < 0.2, bounds, rng.integers(0, bounds + 1, (sprites, 2)))
    dense = _drawn(pictures, places, height, width).unfold(0, patch, stride).unfold(1, patch, stride)
    cut = dense.reshape(-1, 1, patch, patch)

    bag = PastedBag(pictures, places, Grid(width, height, patch, stride))
    chunks = list(bag.chunks(size))
    assert len(bag) == len(cut)
    assert torch.equal(torch.cat([chunk.patches for chunk in chunks]), cut)
    assert torch.equal(torch.cat([chunk.index for chunk in chunks]), torch.arange(len(cut)))
    rows = torch.from_numpy(rng.integers(0, len(cut), 9))
    taken = bag.take(rows)
    assert torch.equal(taken.patches, cut[rows])
    assert torch.equal(taken.index, rows)
    assert taken.positions is not None
    columns = dense.shape[1]
    assert taken.positions.tolist() == [[row % columns, row // columns] for row in rows.tolist()]


def _kinds(patches: torch.Tensor) -> int:
    """How many different patches of (n, ...) hold something."""
    return len({patch.numpy().tobytes() for patch in patches[patches.flatten(1).ne(0).any(dim=1)]})


def test_the_benchmark_draws_as_many_patches_with_something_on_them(shared_mnist: Path) -> None:
    """What `tests.bench.selection` gains by encoding equal patches once is then what it gains on these images."""
    data, images = MegapixelConfig(folder=str(shared_mnist)), 48
    bags = [open_image(data, PATCHES_OF_50, f"{shared_mnist}#test-{n}").bag() for n in range(images)]
    true = sum(_kinds(bag.take(torch.tensor(list(bag._on))).patches) for bag in bags) / images
    drawn = [image for seed in range(images // 8) for image in megapixel_images(8, folder=shared_mnist, seed=seed)]
    assert sum(map(_kinds, drawn)) / images == pytest.approx(true, rel=0.03)


def test_what_a_bag_holds_does_not_grow_with_the_canvas() -> None:
    sprite = np.full((1, SPRITE_PX, SPRITE_PX), 200, np.uint8)
    bag = PastedBag(sprite, np.array([[999_990, 49]]), Grid(1_000_003, 1_000_037, 50, 50))
    assert len(bag) == 20_000 * 20_000
    assert len(pickle.dumps(bag)) < 5000
    chunk = bag.take(torch.tensor([20_000 * 19_999, 0]))
    assert chunk.patches.flatten(1).sum(dim=1).tolist() == [200 * 10, 0]


@pytest.fixture
def small(tmp_path: Path) -> MegapixelConfig:
    return MegapixelConfig(folder=str(write_digits(tmp_path)), train=7, test=5, width=150, height=190, strokes=3)


def test_digits_never_overlap_and_strokes_lie_below(small: MegapixelConfig) -> None:
    for seed in range(5):
        data = small.model_copy(update={"seed": seed, "width": 140, "height": 140, "train": 40})
        for places in _generated(data, "train").places:
            apart = np.abs(places[:, None] - places[None]).max(axis=2) >= SPRITE_PX
            assert (apart | np.eye(5, dtype=bool)).all()


def test_labels_follow_from_the_digits(small: MegapixelConfig) -> None:
    images, digits = _generated(small, "test"), read_digits(small.folder, "test")
    for n in range(5):
        classes = digits.labels[images.digits[n]].tolist()
        label = {task: values[n] for task, values in images.labels().items()}
        assert classes.count(label["majority"]) == 3
        assert label["max"] == max(classes)
        assert label["top"] == min(zip(images.places[n, :, 0].tolist(), range(5), classes, strict=True))[2]
        assert np.flatnonzero(label["multi"]).tolist() == sorted(set(classes))


def test_the_cohort_names_every_image(small: MegapixelConfig) -> None:
    rows = list(csv.DictReader(cohort_csv(small).decode().splitlines()))
    assert [row["slide_id"] for row in rows] == [*(f"train-{n}" for n in range(7)), *(f"test-{n}" for n in range(5))]
    assert rows[9]["uri"] == f"{small.folder}#test-2"
    assert rows[9]["split"] == "test"
    labels = {task: values[2] for task, values in _generated(small, "test").labels().items()}
    for task in ("majority", "max", "top"):
        assert rows[9][task] == str(labels[task])
    assert rows[9]["multi"] == ";".join(map(str, np.flatnonzero(labels["multi"])))


def test_a_handle_is_small_and_good_for_pictures(small: MegapixelConfig) -> None:
    tiling = TilingConfig(patch_px=40, overlap_px=11, mpp=None, tissue="none")
    image = open_image(small, tiling, f"{small.folder}#train-3")
    assert len(pickle.dumps(image)) < 2000
    assert pickle.loads(pickle.dumps(image)) == image
    assert (image.n_patches, image.extent, image.thumbnail_scale) == (4 * 6, 40.0, 1.0)
    assert image.n_patches == len(image.bag())
    corners = image.index()
    assert (corners.x[5], corners.y[5]) == (29, 29)
    thumbnail = simplejpeg.decode_jpeg(image.thumbnail(), colorspace="GRAY")[..., 0].astype(int)
    assert thumbnail.shape == (190, 150)
    (picture,) = image.payloads(np.array([5]))
    patch = simplejpeg.decode_jpeg(picture, colorspace="GRAY")[..., 0].astype(int)
    exact = image.bag().take(torch.tensor([5])).patches[0, 0].numpy()
    assert np.abs(patch - exact).mean() < 6
    large = open_image(small.model_copy(update={"width": 1499}), tiling, f"{small.folder}#train-3")
    assert simplejpeg.decode_jpeg_header(large.thumbnail())[:2] == (64, 500)
    assert large.thumbnail_scale == 3


def test_keys_say_what_decides_the_pixels(small: MegapixelConfig, tmp_path: Path) -> None:
    key = partial(_key, small.folder)
    elsewhere = write_digits(tmp_path / "copy")
    assert key(small) == _key(str(elsewhere), small)  # the place does not matter, the content does
    assert key(small) == key(small.model_copy(update={"test": 77}))
    different = [
        key(small),
        key(small, "train-2"),
        key(small, "test-1"),
        *(key(small.model_copy(update={name: 200})) for name in ("train", "width", "height", "strokes", "seed")),
    ]
    changed = elsewhere / "train-labels-idx1-ubyte"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\0")
    read_digits.cache_clear()
    different.append(_key(str(elsewhere), small))
    assert len(set(different)) == len(different)
    assert len(source_versions(small)) == 4


def _key(folder: str, data: MegapixelConfig, name: str = "train-1") -> str:
    return open_image(data, PATCHES_OF_50, f"{folder}#{name}").key


@pytest.mark.parametrize("name", ["train-7", "test-5", "val-0", "train-", "17"])
def test_a_row_that_names_no_image_is_refused(small: MegapixelConfig, name: str) -> None:
    with pytest.raises(SlideError, match=f"#{name}: (not an image|the set has images)"):
        open_image(small, PATCHES_OF_50, f"{small.folder}#{name}")


def test_without_strokes_only_digits_are_there(small: MegapixelConfig) -> None:
    data = small.model_copy(update={"strokes": 0})
    image = open_image(data, PATCHES_OF_50, f"{small.folder}#train-0")
    labels = read_digits(small.folder, "train").labels
    images = megapixel_mnist(labels, 7, width=150, height=190, strokes=0, seed=0, subset="train")
    pixels = read_digits(small.folder, "train").images[images.digits[0]]
    whole = PastedBag(pixels, images.places[0], Grid(150, 190, 1, 1)).take(torch.arange(150 * 190))
    assert (whole.patches > 0).sum() == (pixels > 0).sum()
    assert len(image.bag()) == 3 * 3
