"""Augmentation: what is drawn for a patch, and what it does to its pixels, on the device that they are on.

It is a pure function of (seed, epoch, slide key, row), so the patch that was scored is the patch that is trained on, in
any chunking and after any restart. Pixels travel to the device as they were read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.bags.stain import jittered

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Changes:
    """What augmentation does to some patches: an `ips.bag.Chunk.prepare`."""

    codes: npt.NDArray[np.int64]
    """(n,), see `Augment.codes`."""
    stains: npt.NDArray[np.float32] | None
    """(n, 2, 3), see `Augment.stains`; None changes no colour."""

    def __call__(self, patches: Tensor) -> Tensor:
        """Square patches (n, C, p, p) uint8, or with surroundings below (n, C, 2p, p) -> as many, changed alike."""
        squares = torch.unflatten(patches, 2, (-1, patches.shape[3]))
        turned = torch.empty_like(squares)
        for code in np.unique(self.codes).tolist():
            rows = torch.from_numpy(np.flatnonzero(self.codes == code)).to(patches.device)
            turned[rows] = oriented(squares[rows], code)
        found = turned.flatten(2, 3)
        return found if self.stains is None else jittered(found, self.stains[:, 0], self.stains[:, 1])


def joined(parts: Sequence[tuple[Rows, Changes]]) -> Changes:
    """Changes of one chunk from those of its slides, each with the places in the chunk that they are for."""
    places = np.argsort(np.concatenate([at for at, _ in parts]))
    codes = np.concatenate([changes.codes for _, changes in parts])[places]
    stains = [changes.stains for _, changes in parts if changes.stains is not None]
    return Changes(codes, np.concatenate(stains)[places] if stains else None)


@dataclass(frozen=True)
class Augment:
    """Flips and right-angle turns, the eight symmetries of the square, and jitter of the stains' colours."""

    seed: int
    epoch: int
    key: str
    """Of the slide."""
    stain: float = 0.0
    """Strength of the jitter (`stains`)."""

    def changes(self, rows: Rows) -> Changes:
        """What is drawn for each row."""
        return Changes(self.codes(rows), self.stains(rows) if self.stain else None)

    def codes(self, rows: Rows) -> npt.NDArray[np.int64]:
        """(n,) in 0..7 for each row: bit 0 flips left-right, bits 1 and 2 count quarter turns."""
        return (self._bits(rows) & np.uint64(7)).astype(np.int64)

    def stains(self, rows: Rows) -> npt.NDArray[np.float32]:
        """(n, 2, 3): each stain's factor, within 1 - stain and 1 + stain, and shift, within -stain and stain."""
        draws: npt.NDArray[np.uint64] = self._bits(rows)[:, None] + np.arange(1, 7).astype(np.uint64)
        uniform = (_splitmix64(draws) >> np.uint64(11)) / 2.0**52 - 1  # 53 bits, in -1..1
        return (self.stain * uniform.reshape(-1, 2, 3) + [[[1.0], [0.0]]]).astype(np.float32)

    def _bits(self, rows: Rows) -> npt.NDArray[np.uint64]:
        """(n,) random bits of each row."""
        digest = hashlib.blake2b(f"{self.seed}/{self.epoch}/{self.key}".encode(), digest_size=8).digest()
        return _splitmix64(rows.astype(np.uint64) + np.uint64(int.from_bytes(digest, "little")))


def oriented(patches: Tensor, code: int) -> Tensor:
    """A view of square patches (..., p, p), flipped and turned as the code of `Augment.codes` says."""
    flipped = patches.flip(-1) if code & 1 else patches
    return flipped.rot90(code >> 1, (-2, -1))


def _splitmix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that scatters neighbouring counters."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
