"""The rows of slides as a dataset of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from pipeline.datasets.slide import Slide


class RowDataset(Dataset[dict[str, Any]]):
    """Map-style: a row is a dict with key, row, x, y, and `image` (3, p, p) uint8 or `feature` (D,).

    A batch is read at once, neighbours in one request (`__getitems__`). Picklable, so `DataLoader` may start workers by
    fork or spawn.

    Args:
        slides: of one store; their rows follow one another.
        transform: applied to each image or feature.
    """

    def __init__(self, slides: Sequence[Slide], transform: Callable[[Any], Any] | None = None) -> None:
        self.slides = tuple(slides)
        self._transform = transform
        self._ends = np.cumsum([slide.n_patches for slide in slides], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows, in their order.

        Raises:
            IndexError: there is no such row.
            StorageError: the store cannot be read.
        """
        wanted = np.asarray(indices, np.int64)
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"the dataset has {len(self)} rows")
        owners = np.searchsorted(self._ends, wanted, side="right")
        found: list[dict[str, Any]] = [{} for _ in indices]
        for number in np.unique(owners).tolist():
            members = np.flatnonzero(owners == number)
            slide = self.slides[number]
            batch = slide.read(wanted[members] - (self._ends[number] - slide.n_patches))
            name, data = "image" if slide.dim is None else "feature", batch.tensor()
            for at, member in enumerate(members.tolist()):
                value = data[at] if self._transform is None else self._transform(data[at])
                place = {"row": int(batch.rows[at]), "x": int(batch.x[at]), "y": int(batch.y[at])}
                found[member] = {"key": slide.key, **place, name: value}
        return found
