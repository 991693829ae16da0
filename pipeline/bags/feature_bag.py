"""From stored or given features to chunks of vectors: one range read a part, the next chunk read ahead of use."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ips.bag import Chunk
from pipeline.store.features import Features
from pipeline.store.index import Ints


class VectorSlide(Protocol):
    """A slide whose patches are vectors."""

    @property
    def n_patches(self) -> int: ...  # noqa: D102
    def positions(self, rows: Ints) -> Ints: ...  # noqa: D102
    def vectors(self, rows: Ints) -> Features:
        """(n, D) of `rows`, in their order."""
        ...


class FeatureBag:
    """The features of one slide as an `ips` bag; holds its index and at most two chunks."""

    def __init__(self, slide: VectorSlide) -> None:
        self._slide = slide

    def __len__(self) -> int:
        return self._slide.n_patches

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Every row once, in order, as (n, D) float16 or float32.

        Raises:
            StorageError: the store cannot be read.
        """
        return self.strip(size, 0, len(self))

    def strip(self, size: int, start: int, stop: int) -> Iterator[Chunk]:
        """Rows `start` to `stop`, as `chunks` gives all."""
        rows = [np.arange(low, min(low + size, stop)) for low in range(start, stop, size)]
        with ThreadPoolExecutor(1, "read") as reader:
            ahead: Future[Chunk] | None = None
            try:
                for place in range(len(rows)):
                    chunk = ahead.result() if ahead else self._load(rows[0])
                    ahead = reader.submit(self._load, rows[place + 1]) if place + 1 < len(rows) else None
                    yield chunk
            finally:
                if ahead is not None:
                    ahead.cancel()

    def take(self, rows: Tensor) -> Chunk:
        """The features of `rows` (n,) int64, in that order, by exact range reads.

        Raises:
            StorageError: the store cannot be read.
        """
        return self._load(rows.numpy())

    def _load(self, rows: Ints) -> Chunk:
        vectors = torch.from_numpy(self._slide.vectors(rows).copy())  # torch wants memory that may be written
        positions = torch.from_numpy(self._slide.positions(rows).astype(np.float32))
        return Chunk(vectors, torch.from_numpy(rows), positions)
