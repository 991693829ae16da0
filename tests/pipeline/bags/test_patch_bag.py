"""Bags over a real patch store: the pixels are the store's, in any chunking, and augmentation is a pure function."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch
from hypothesis import strategies as st

from ips.bag import Chunk
from ips.selection.shards import Strips
from ips.selection.transfer import arrived
from pipeline.bags.augment import Augment
from pipeline.bags.patch_bag import PatchBag
from pipeline.bags.stain import jittered
from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import DamagedError, StorageError
from pipeline.ingest.tiler import store_slide
from pipeline.slides.open import open_slide
from pipeline.storage.tree import upload_tree
from pipeline.store.patches import PatchStore, StoredSlide
from pipeline.tiling.cutting import split
from pipeline.training.hands import Waits
from tests.pipeline.small import write_slide
from tests.pipeline.tiled import part_file
from tests.s3 import serve_s3
from tests.synth import tissue_rgb, write_pyramid

PICTURE = tissue_rgb(313, 271)
SPEC = TilingConfig(patch_px=19, mpp=None, tissue="none", edge="drop")  # 211 x 157 px: a grid of 11 x 8


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def slides(store: str, tmp_path_factory: pytest.TempPathFactory) -> list[StoredSlide]:
    folder = tmp_path_factory.mktemp("slides")
    return [stored(folder / f"{number}.png", number, store) for number in range(2)]


def stored(path: Path, seed: int, store: str) -> StoredSlide:
    write_slide(path, seed)
    status = store_slide(CohortSlide(path.stem, str(path), path.stem, None, None, {}, {}), SPEC, store)
    assert status.key is not None, status.error
    return PatchStore(store, SPEC.fingerprint()).slide(status.key)


def ready(chunk: Chunk) -> torch.Tensor:
    """The patches as the network gets them."""
    return arrived(chunk, torch.device("cpu"))


def same(one: Chunk, other: Chunk) -> bool:
    assert one.positions is not None
    assert other.positions is not None
    return (
        torch.equal(ready(one), ready(other))
        and torch.equal(one.index, other.index)
        and torch.equal(one.positions, other.positions)
    )


def joined(chunks: Iterator[Chunk]) -> Chunk:
    parts = list(chunks)
    positions = [part.positions for part in parts if part.positions is not None]
    return Chunk(
        torch.cat([ready(part) for part in parts]), torch.cat([part.index for part in parts]), torch.cat(positions)
    )


@pytest.mark.parametrize("size", [7, 88, 1000])
def test_strips_are_read_ahead_and_give_the_same_rows(
    slides: list[StoredSlide], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also through the loop's watch; nothing is taken a chunk at a time while the encoder waits."""
    augment = Augment(3, 1, "")
    whole = joined(PatchBag(slides, threads=2, augment=augment).chunks(1000))
    monkeypatch.setattr(PatchBag, "take", lambda *_: pytest.fail("taken"))
    bag = Waits().watched(PatchBag(slides, threads=2, augment=augment))
    group: Any = None
    parts = [[chunk for _, chunk in Strips(group, rank, 3).chunks([bag], size)] for rank in range(3)]
    assert [sum(len(chunk.index) for chunk in part) for part in parts] == [58, 59, 59]
    assert all(len(chunk.index) <= size for part in parts for chunk in part)
    assert same(joined(chunk for part in parts for chunk in part), whole)


@pytest.mark.parametrize("size", [1, 7, 88, 89, 1000])
def test_every_row_once_in_order(slides: list[StoredSlide], size: int) -> None:
    bag = PatchBag(slides, threads=2, augment=None)
    assert len(bag) == 2 * 88
    chunks = list(bag.chunks(size))
    assert [len(chunk.index) for chunk in chunks] == [min(size, 176 - start) for start in range(0, 176, size)]
    whole = joined(iter(chunks))
    assert whole.index.dtype == torch.int64
    assert whole.index.tolist() == list(range(176))
    assert whole.patches.dtype == torch.uint8
    assert whole.patches.shape == (176, 3, 19, 19)
    for number, slide in enumerate(slides):
        for row in (0, 41, 87):
            (payload,) = slide.payloads([row])
            expected = simplejpeg.decode_jpeg(payload).transpose(2, 0, 1)
            assert np.array_equal(whole.patches[88 * number + row].numpy(), expected)


def test_memory_of_chunks_goes_round_once_nobody_holds_them(slides: list[StoredSlide]) -> None:
    bag = PatchBag(slides, threads=2, augment=None)
    seen = {chunk.patches.data_ptr() for chunk in bag.chunks(5)}
    assert len(seen) <= 6 < 176 // 5
    kept = [chunk.patches[3:4] for chunk in bag.chunks(5)]  # a view holds its chunk
    assert torch.equal(torch.cat(kept), joined(bag.chunks(176)).patches[3::5])


def test_patches_of_any_subsampling(tmp_path: Path, store: str) -> None:
    for subsampling in ("444", "422", "420"):
        path = write_pyramid(tmp_path / f"{subsampling}.tiff", PICTURE, tile=64, subsampling=subsampling, shared=True)
        spec = TilingConfig(patch_px="native", tissue="none", edge="drop")
        status = store_slide(CohortSlide(path.stem, str(path), path.stem, None, None, {}, {}), spec, store)
        slide = PatchStore(store, spec.fingerprint()).slide(str(status.key))
        with open_slide(path) as reader:
            patches = joined(PatchBag([slide], threads=1, augment=None).chunks(9)).patches
            for patch, x, y in zip(patches, slide.index().x.tolist(), slide.index().y.tolist(), strict=True):
                assert np.array_equal(patch.permute(1, 2, 0).numpy(), reader.read(0, x, y, 64, 64))


def test_positions_are_grid_columns_and_rows(slides: list[StoredSlide]) -> None:
    whole = joined(PatchBag(slides, threads=1, augment=None).chunks(50))
    grid = [[column, row] for row in range(8) for column in range(11)]
    assert whole.positions is not None
    assert whole.positions.dtype == torch.float32
    assert whole.positions.tolist() == grid + grid


@hypothesis.given(rows=st.lists(st.integers(0, 175), min_size=1, max_size=40), augmented=st.booleans())
@hypothesis.settings(
    max_examples=15, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_take_gives_what_chunks_gave(slides: list[StoredSlide], rows: list[int], *, augmented: bool) -> None:
    bag = PatchBag(slides, threads=2, augment=Augment(3, 5, slides[0].key) if augmented else None)
    whole, at = joined(bag.chunks(31)), torch.tensor(rows)
    assert whole.positions is not None
    assert same(bag.take(at), Chunk(whole.patches[at], at, whole.positions[at]))


def test_chunking_and_threads_change_nothing(slides: list[StoredSlide]) -> None:
    augment = Augment(1, 2, slides[0].key)
    first = joined(PatchBag(slides, threads=1, augment=augment).chunks(176))
    assert same(first, joined(PatchBag(slides, threads=3, augment=augment).chunks(13)))


def test_a_slide_is_augmented_alike_in_every_bag(slides: list[StoredSlide]) -> None:
    augment = Augment(1, 2, slides[0].key)
    both = joined(PatchBag(slides, threads=1, augment=augment).chunks(100))
    alone = joined(PatchBag(slides[1:], threads=1, augment=replace(augment, key=slides[1].key)).chunks(100))
    assert torch.equal(both.patches[88:], alone.patches)


def test_augmentation_turns_the_plain_patch(slides: list[StoredSlide]) -> None:
    augment = Augment(7, 0, slides[0].key)
    plain = joined(PatchBag(slides[:1], threads=1, augment=None).chunks(88)).patches
    turned = joined(PatchBag(slides[:1], threads=1, augment=augment).chunks(88)).patches
    for row, code in enumerate(augment.codes(np.arange(88)).tolist()):
        flipped = plain[row].flip(2) if code & 1 else plain[row]
        assert torch.equal(turned[row], flipped.rot90(code >> 1, (1, 2)))


def test_stain_jitter_is_the_same_in_chunks_and_takes(slides: list[StoredSlide]) -> None:
    augment = Augment(3, 5, slides[0].key, stain=0.2)
    bag = PatchBag(slides, threads=2, augment=augment)
    whole, at = joined(bag.chunks(31)), torch.tensor([170, 3, 3, 88])
    assert torch.equal(ready(bag.take(at)), whole.patches[at])
    turned = joined(PatchBag(slides, threads=1, augment=replace(augment, stain=0.0)).chunks(50)).patches
    assert not torch.equal(whole.patches, turned)
    ((scale, shift),) = augment.stains(np.array([3]))
    assert torch.equal(whole.patches[3:4], jittered(turned[3:4], scale[None], shift[None]))


def damaged(slide: StoredSlide, row: int, folder: Path, payload: bytes) -> StoredSlide:
    """A copy of a stored slide with other bytes at the start of one patch."""
    upload_tree(Path(slide.uri), str(folder / slide.key))
    index = pq.read_table(folder / slide.key / "index.parquet").to_pylist()[row]
    path = part_file(folder / slide.key, index["part"])
    data = bytearray(path.read_bytes())
    data[index["offset"] : index["offset"] + len(payload)] = payload
    path.write_bytes(data)
    return replace(slide, uri=str(folder / slide.key))


def test_a_damaged_patch_is_named(slides: list[StoredSlide], tmp_path: Path) -> None:
    small = simplejpeg.encode_jpeg(np.zeros((5, 3, 3), np.uint8))
    for number, (payload, reason) in enumerate([(b"\0" * 32, ""), (small, "it is 3 x 5 px, not 19")]):
        slide = damaged(slides[0], 41, tmp_path / str(number), payload)
        bag = PatchBag([slides[1], slide], threads=2, augment=None)
        expected = rf"{slide.key}, part 0: the patch of row 41 cannot be decoded \({reason}.*tile again"
        with pytest.raises(StorageError, match=expected):
            list(bag.chunks(10))
        with pytest.raises(StorageError, match=expected):
            bag.take(torch.tensor([3, 88 + 41]))
        assert len(bag.take(torch.tensor([3, 88 + 40])).index) == 2


def test_a_lost_part_is_named(slides: list[StoredSlide], tmp_path: Path) -> None:
    slide = damaged(slides[0], 0, tmp_path, b"")
    part_file(tmp_path / slide.key).unlink()
    with pytest.raises(StorageError, match=r"part-00000-\w+\.arrow: it does not exist"):
        list(PatchBag([slide], threads=1, augment=None).chunks(10))


def test_no_thread_outlives_an_abandoned_iteration(slides: list[StoredSlide]) -> None:
    before = set(threading.enumerate())
    chunks = PatchBag(slides, threads=2, augment=None).chunks(5)
    next(chunks)
    assert set(threading.enumerate()) > before
    del chunks
    assert set(threading.enumerate()) == before


def test_memory_does_not_grow_with_the_bag(slides: list[StoredSlide]) -> None:
    def peak(repeats: int) -> int:
        bag = PatchBag(slides * repeats, threads=2, augment=Augment(0, 0, "k"))
        tracemalloc.start()
        for chunk in bag.chunks(64):
            del chunk
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    peak(1)  # the index is read and kept
    chunk = 64 * 19 * 19 * 3
    # At most four chunks of pixels and their JPEGs, in flight or in use: how many at once is the threads' luck.
    assert peak(100) < 16 * chunk < len(PatchBag(slides * 100, threads=2, augment=None)) * 19 * 19 * 3 / 4


def test_an_empty_take(slides: list[StoredSlide]) -> None:
    chunk = PatchBag(slides, threads=2, augment=None).take(torch.zeros(0, dtype=torch.int64))
    assert chunk.patches.shape == (0, 3, 19, 19)
    assert chunk.positions is not None
    assert chunk.positions.shape == (0, 2)


def test_on_s3(tmp_path: Path, slides: list[StoredSlide], monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(tmp_path / "s3") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        remote = replace(slides[0], uri=server.bucket("patches") + "/spec/" + slides[0].key)
        upload_tree(Path(slides[0].uri), remote.uri)
        bag = PatchBag([remote], threads=2, augment=None)
        local = PatchBag(slides[:1], threads=2, augment=None)
        assert same(joined(bag.chunks(40)), joined(local.chunks(40)))
        rows = torch.tensor([80, 3, 4, 3])
        assert same(bag.take(rows), local.take(rows))


def surrounded(folder: Path) -> tuple[StoredSlide, StoredSlide]:
    """A slide stored without surroundings and with them."""
    path = write_pyramid(folder / "a.tiff", PICTURE, tile=64)
    row, found = CohortSlide("a", str(path), "a", None, None, {}, {}), []
    for context in (None, 2.0):
        spec = TilingConfig(patch_px=32, tissue="none", context_mpp=context)
        status = store_slide(row, spec, str(folder / "store"))
        found.append(PatchStore(str(folder / "store"), spec.fingerprint()).slide(str(status.key)))
    return found[0], found[1]


def test_surroundings_stand_below_their_patch(tmp_path: Path) -> None:
    plain, both = surrounded(tmp_path)
    assert (plain.context_mpp, both.context_mpp) == (None, 2.0)
    bag = PatchBag([both], threads=2, augment=None)
    whole = joined(bag.chunks(1000))
    assert whole.patches.shape == (both.n_patches, 3, 64, 32)
    assert torch.equal(whole.patches[:, :, :32], joined(PatchBag([plain], threads=1, augment=None).chunks(9)).patches)
    for row in (0, 7, both.n_patches - 1):
        around = simplejpeg.decode_jpeg(split(both.payloads([row])[0])[1])
        assert torch.equal(whole.patches[row, :, 32:], torch.from_numpy(around).permute(2, 0, 1))
    rows = torch.tensor([5, 0, 11])
    assert torch.equal(bag.take(rows).patches, whole.patches[rows])
    assert bag.take(rows[:0]).patches.shape == (0, 3, 64, 32)
    with pytest.raises(DamagedError, match="row 0 cannot be decoded .it has no second picture"):
        list(PatchBag([replace(plain, context_mpp=2.0)], threads=1, augment=None).chunks(9))
