"""From stored or given features to chunks of vectors: one range read a part, the next chunk read ahead of use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
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
    """The features of one slide, or of several slides of a patient, as an `ips` bag.

    Holds the index of its slides and at most two chunks.

    Args:
        slides: of one encoder; their rows follow one another.
    """

    def __init__(self, slides: Sequence[VectorSlide]) -> None:
        self._slides = tuple(slides)
        self._starts = np.array([0, *accumulate(slide.n_patches for slide in slides)], np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

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
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        vectors: Features | None = None
        positions = np.empty((len(rows), 2), np.float32)
        for number in np.unique(owners).tolist() or [0]:  # of no rows the first slide gives none
            members = np.flatnonzero(owners == number)
            slide, own = self._slides[number], rows[members] - self._starts[number]
            found = slide.vectors(own)
            if vectors is None:  # torch wants memory that may be written
                vectors = np.empty((len(rows), found.shape[1]), found.dtype)
            vectors[members], positions[members] = found, slide.positions(own)
        assert vectors is not None
        return Chunk(torch.from_numpy(vectors), torch.from_numpy(rows), torch.from_numpy(positions))
