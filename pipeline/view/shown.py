"""What can be looked at, whoever wrote it: slides with what is known of each, and the layers over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.view.colours import Scale
from pipeline.view.rasters import Floats, Mask, Squares

ATTENTION = "attention"
READ, TISSUE = "read", "tissue"
"""Layers that darken what is not meant: where the model read nothing, what is no tissue."""


@dataclass(frozen=True)
class Told:
    """One number that a model says of a slide."""

    name: str
    value: float
    low: float | None = None
    """Of its interval."""
    high: float | None = None
    interval: str = ""
    """What that is, in a word: `models` of an ensemble, `calibrated`, `95%`."""
    tested: int | None = None
    """Patients of the test that it follows from."""


@dataclass(frozen=True)
class ShownSlide:
    """One slide of the list."""

    slide_id: str
    uri: str
    mpp: float | None = None
    """Microns per level-0 px that it was read with; None: what the file states."""
    label: str | None = None
    told: tuple[Told, ...] = ()
    reason: str | None = None
    """Why there is no prediction."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further words for the panel beside it, by what they are."""


@dataclass(frozen=True)
class Patches:
    """The patches of one slide."""

    squares: Squares
    values: Mapping[str, Floats]
    """By layer (N,): attention relative to uniform (attention * N), effects in their own unit."""
    selected: npt.NDArray[np.bool_]
    """(N,) one of those that the model kept."""

    @property
    def mass(self) -> float | None:
        """Share of the attention that lies in the selected patches."""
        attention = self.values.get(ATTENTION)
        total = 0.0 if attention is None else float(attention.sum())
        return float(attention[self.selected].sum()) / total if attention is not None and total > 0 else None

    def top(self, most: int) -> npt.NDArray[np.int64]:
        """Rows of the patches with the highest attention, the highest first; of equal ones the first row."""
        attention = self.values.get(ATTENTION)
        if attention is None:
            return np.zeros(0, np.int64)
        return np.argsort(-attention, kind="stable")[:most]


class Batch(ABC):
    """Slides that belong together: a prediction, or a store."""

    name: str
    """For people: the model, or the store."""
    slides: Sequence[ShownSlide]
    scales: Mapping[str, Scale]
    """By layer of numbers, in the order in which they are offered; the same for all slides."""

    def series(self, number: int) -> int | None:
        """Which image of its file a slide is; None: the one that the file has."""
        del number
        return None

    def sentences(self, number: int) -> Sequence[str]:
        """What a person should know of a slide's numbers, in words."""
        del number
        return ()

    @abstractmethod
    def patches(self, number: int) -> Patches | None:
        """Of a slide; None where there are none, as where it was not predicted.

        Raises:
            StorageError: they cannot be read, or not understood.
        """

    def tissue(self, number: int) -> Mask | None:
        """Where tissue is, over the whole slide (H, W) in small; None where nobody said."""
        del number
        return None
