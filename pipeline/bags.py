"""From the patch store to chunks of pixels: one range read a chunk, decoded ahead of use, host memory constant.

Augmentation is a pure function of (seed, epoch, slide key, row), so the patch that was scored is the patch that is
trained on, in any chunking and after any restart.
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from torch import Tensor

from ips.bag import Chunk
from pipeline.errors import DamagedError
from pipeline.patches import PatchIndex
from pipeline.stain import jittered

_AHEAD = 2  # chunks read ahead of the one in use
_FREE = 3  # references to a free array: the list's, the loop's and that of the question itself
_PIXEL = np.dtype("V3")  # moved whole: turning a 256 px patch takes 0.1 ms, byte by byte 0.22; decoding it 0.18
Rows = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


class JpegSlide(Protocol):
    """A slide whose patches come as JPEGs: from the store, or cut from the slide itself."""

    @property
    def uri(self) -> str: ...  # noqa: D102
    @property
    def key(self) -> str: ...  # noqa: D102
    @property
    def n_patches(self) -> int: ...  # noqa: D102
    @property
    def patch_px(self) -> int: ...  # noqa: D102
    @property
    def stride(self) -> float: ...  # noqa: D102
    def index(self) -> PatchIndex: ...  # noqa: D102
    def payloads(self, rows: Rows) -> list[bytes]:
        """The JPEGs of `rows`, in their order."""
        ...


@dataclass(frozen=True)
class Augment:
    """Flips and right-angle turns, the eight symmetries of the square, and jitter of the stains' colours."""

    seed: int
    epoch: int
    key: str
    """Of the slide."""
    stain: float = 0.0
    """Strength of the jitter (`stains`)."""

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


def oriented(patch: npt.NDArray[Any], code: int) -> npt.NDArray[Any]:
    """A view of a square patch (p, p, ...), flipped and turned as the code of `Augment.codes` says."""
    flipped = patch[:, ::-1] if code & 1 else patch
    return np.rot90(flipped, code >> 1)


def _splitmix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that scatters neighbouring counters."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class PatchBag:
    """The patches of one slide, or of several slides of a patient, as an `ips` bag.

    Holds the index of its slides and at most four chunks, whatever its length: the one in use, two read ahead,
    one being read.

    Args:
        slides: committed slides of one tiling spec; their rows follow one another.
        threads: decoding threads; a further one reads.
        augment: None for evaluation. Its key gives way to that of the slide a row belongs to.
    """

    def __init__(self, slides: Sequence[JpegSlide], *, threads: int, augment: Augment | None) -> None:
        self._slides = tuple(slides)
        self._threads = threads
        self._augment = augment
        self._starts = np.array([0, *accumulate(slide.n_patches for slide in slides)], np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Every row once, in order; the next chunks are read and decoded while one is in use.

        Raises:
            StorageError: the store cannot be read.
            DamagedError: a patch in it cannot be decoded.
        """
        return self.strip(size, 0, len(self))

    def strip(self, size: int, start: int, stop: int) -> Iterator[Chunk]:
        """Rows `start` to `stop`, as `chunks` gives all."""
        edge, rooms = self._slides[0].patch_px, _Rooms()
        with ThreadPoolExecutor(self._threads, "decode") as decoders, ThreadPoolExecutor(1, "read") as reader:
            ahead: deque[Future[_Loading]] = deque()
            try:
                for low in range(start, stop, size):
                    rows = np.arange(low, min(low + size, stop))
                    room = rooms.take((min(size, stop - start), edge, edge, 3))
                    ahead.append(reader.submit(self._load, rows, decoders, room[: len(rows)]))
                    if len(ahead) > _AHEAD:
                        yield self._chunk(ahead.popleft().result())
                while ahead:
                    yield self._chunk(ahead.popleft().result())
            finally:
                for future in ahead:
                    future.cancel()

    def take(self, rows: Tensor) -> Chunk:
        """The patches of `rows` (n,) int64, in that order, by exact range reads.

        Raises:
            StorageError: the store cannot be read.
            DamagedError: a patch in it cannot be decoded.
        """
        with ThreadPoolExecutor(self._threads, "decode") as decoders:
            edge = self._slides[0].patch_px
            return self._chunk(self._load(rows.numpy(), decoders, np.empty((len(rows), edge, edge, 3), np.uint8)))

    def _load(self, rows: Rows, decoders: ThreadPoolExecutor, patches: Pixels) -> _Loading:
        """Read the bytes of `rows`, and hand them to the decoders, which fill `patches`."""
        jobs: list[_Job] = []
        for slide, members, own in self._by_slide(rows):
            augment = None if self._augment is None else replace(self._augment, key=slide.key)
            codes = np.zeros_like(own) if augment is None else augment.codes(own)
            stains = augment.stains(own) if augment is not None and augment.stain else [None] * len(own)
            for place, row, code, stain, payload in zip(members, own, codes, stains, slide.payloads(own), strict=True):
                jobs.append(_Job(patches[place], payload, int(code), stain, slide, int(row)))
        share = -(-len(jobs) // self._threads)
        decoding = [decoders.submit(_decode_all, jobs[i : i + share]) for i in range(0, len(jobs), share or 1)]
        return _Loading(rows, patches, decoding)

    def _chunk(self, loading: _Loading) -> Chunk:
        for part in loading.decoding:
            part.result()
        pixels = torch.from_numpy(loading.patches).permute(0, 3, 1, 2)
        positions = np.empty((len(loading.rows), 2), np.float32)
        for slide, members, own in self._by_slide(loading.rows):
            index = slide.index()
            positions[members] = np.rint(np.stack([index.x[own], index.y[own]], axis=1) / slide.stride)
        return Chunk(pixels, torch.from_numpy(loading.rows), torch.from_numpy(positions))

    def _by_slide(self, rows: Rows) -> Iterator[tuple[JpegSlide, Rows, Rows]]:
        """Each slide that `rows` fall in, which of them do, and their rows within it."""
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(owners).tolist():
            members = np.flatnonzero(owners == number)
            yield self._slides[number], members, rows[members] - self._starts[number]


class _Rooms:
    """Memory for chunks; that of a chunk which nobody holds any more is used again.

    Fresh memory costs a quarter of the decoding: the system clears it first. A tensor holds the array that it is a view
    of, so the array's references tell whether a chunk, or any part of it, is still in use.
    """

    def __init__(self) -> None:
        self._arrays: list[Pixels] = []

    def take(self, shape: tuple[int, ...]) -> Pixels:
        for array in self._arrays:
            if sys.getrefcount(array) == _FREE:
                return array
        self._arrays.append(np.empty(shape, np.uint8))
        return self._arrays[-1]


class _Job(NamedTuple):
    """One patch to decode."""

    out: Pixels
    payload: bytes
    code: int
    stain: npt.NDArray[np.float32] | None
    """(2, 3), see `Augment.stains`."""
    slide: JpegSlide
    row: int


@dataclass(frozen=True)
class _Loading:
    """A chunk whose bytes are read and whose pixels are being filled in."""

    rows: Rows
    patches: Pixels
    decoding: list[Future[None]]


def _decode_all(jobs: Sequence[_Job]) -> None:
    room = np.empty_like(jobs[0].out) if jobs else None
    for job in jobs:
        in_place = job.code == 0 and job.stain is None
        try:  # releases the GIL
            pixels = simplejpeg.decode_jpeg(job.payload, colorspace="RGB", buffer=job.out if in_place else room)
        except ValueError as error:
            raise _damaged(job, str(error)) from error
        if pixels.shape != job.out.shape:
            raise _damaged(job, f"it is {pixels.shape[1]} x {pixels.shape[0]} px, not {len(job.out)}")
        if in_place:
            continue
        if job.stain is not None:
            pixels = jittered(pixels, *job.stain)
        job.out.view(_PIXEL)[..., 0] = oriented(pixels.view(_PIXEL)[..., 0], job.code)


def _damaged(job: _Job, reason: str) -> DamagedError:
    part, reason = int(job.slide.index().part[job.row]), f"the patch of row {job.row} cannot be decoded ({reason})"
    if part < 0:
        return DamagedError(
            f"{job.slide.uri}: {reason}; set tiling.codec=checked, which leaves such patches "
            "out, copy the slide again, or take it out of the cohort"
        )
    return DamagedError(
        f"{job.slide.uri}, part {part}: {reason}; the store is damaged: remove that folder and tile again. If `verify` "
        "finds it whole, the slide itself is damaged there: tiling.codec=checked leaves such patches out"
    )
