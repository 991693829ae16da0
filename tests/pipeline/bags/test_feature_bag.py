from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.bags.feature_bag import FeatureBag
from pipeline.errors import StorageError
from pipeline.store.features import FeatureStore
from tests.pipeline.small import small_config, store_slides, write_cohort


@pytest.fixture
def bag_and_vectors(tmp_path: Path) -> tuple[FeatureBag, np.ndarray]:
    ((_, stored),) = store_slides(write_cohort(tmp_path, ["no"]), tmp_path / "store", small_config())
    whole = np.random.default_rng(0).normal(size=(stored.n_patches, 5)).astype(np.float16)
    return FeatureBag([FeatureStore(str(tmp_path / "features"), "a", "b").write(stored, [whole], {})]), whole


@pytest.mark.parametrize("size", [1, 4, 100])
def test_chunks_are_all_rows_in_order(bag_and_vectors: tuple[FeatureBag, np.ndarray], size: int) -> None:
    bag, whole = bag_and_vectors
    chunks = list(bag.chunks(size))
    assert all(len(chunk.index) == size for chunk in chunks[:-1])
    assert torch.cat([chunk.index for chunk in chunks]).tolist() == list(range(len(bag)))
    assert (torch.cat([chunk.patches for chunk in chunks]).numpy() == whole).all()
    assert chunks[0].patches.dtype == torch.float16
    assert chunks[0].positions is not None
    assert chunks[0].positions[0].tolist() == [0, 0]


def test_take_gives_what_chunks_gave(bag_and_vectors: tuple[FeatureBag, np.ndarray]) -> None:
    bag, whole = bag_and_vectors
    rows = torch.tensor([5, 2, 5, len(bag) - 1])
    chunk = bag.take(rows)
    assert (chunk.patches.numpy() == whole[rows.numpy()]).all()
    (everything,) = bag.chunks(len(bag))
    assert everything.positions is not None
    assert chunk.positions is not None
    assert (chunk.positions == everything.positions[rows]).all()
    assert bag.take(rows[:0]).patches.shape == (0, whole.shape[1])


def test_a_strip_is_a_part_of_it(bag_and_vectors: tuple[FeatureBag, np.ndarray]) -> None:
    bag, whole = bag_and_vectors
    chunks = list(bag.strip(3, 2, 9))
    assert [chunk.index.tolist() for chunk in chunks] == [[2, 3, 4], [5, 6, 7], [8]]
    assert (torch.cat([chunk.patches for chunk in chunks]).numpy() == whole[2:9]).all()


def test_a_reader_may_stop_early(bag_and_vectors: tuple[FeatureBag, np.ndarray]) -> None:
    chunks = bag_and_vectors[0].chunks(2)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]


def test_a_part_that_is_gone_is_an_error(bag_and_vectors: tuple[FeatureBag, np.ndarray]) -> None:
    bag = bag_and_vectors[0]
    next(Path(bag._slides[0].uri).glob("part-00000-*.arrow")).unlink()  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"part-00000-\w+\.arrow"):
        list(bag.chunks(3))
