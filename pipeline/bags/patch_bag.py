"""From the patch store to chunks of pixels: one range read a chunk, decoded ahead of use, host memory constant."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from torch import Tensor

from ips.bag import Chunk
from pipeline.bags.augment import Augment, joined
from pipeline.errors import DamagedError
from pipeline.store.index import PatchIndex
from pipeline.telemetry import level, spending
from pipeline.tiling.cutting import split

_AHEAD = 2  # chunks read ahead of the one in use
_FREE = 3  # references to a free array: the list's, the loop's and that of the question itself
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
    def context_mpp(self) -> float | None: ...  # noqa: D102
    def positions(self, rows: Rows) -> Rows: ...  # noqa: D102
    def index(self) -> PatchIndex: ...  # noqa: D102
    def payloads(self, rows: Rows) -> list[bytes]:
        """The JPEGs of `rows`, in their order; with `context_mpp` two each (`tiling.cutting`)."""
        ...


class PatchBag:
    """The patches of one slide, or of several slides of a patient, as an `ips` bag.

    Patches are (n, 3, p, p); with surroundings (n, 3, 2p, p), these below the patch, as `ips.TwoScales` takes them.
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
        rooms = _Rooms()
        with ThreadPoolExecutor(self._threads, "decode") as decoders, ThreadPoolExecutor(1, "read") as reader:
            ahead: deque[Future[_Loading]] = deque()
            try:
                for low in range(start, stop, size):
                    rows = np.arange(low, min(low + size, stop))
                    room = rooms.take((min(size, stop - start), *self._shape))
                    ahead.append(reader.submit(self._load, rows, decoders, room[: len(rows)]))
                    if len(ahead) > _AHEAD:
                        level("ips_chunks_ahead", sum(future.done() for future in ahead))
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
            return self._chunk(self._load(rows.numpy(), decoders, np.empty((len(rows), *self._shape), np.uint8)))

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a patch, with its surroundings below it."""
        first = self._slides[0]
        return first.patch_px * (1 if first.context_mpp is None else 2), first.patch_px, 3

    def _load(self, rows: Rows, decoders: ThreadPoolExecutor, patches: Pixels) -> _Loading:
        """Read the bytes of `rows`, and hand them to the decoders, which fill `patches`."""
        jobs: list[_Job] = []
        for slide, members, own in self._by_slide(rows):
            with spending("read"):
                payloads = slide.payloads(own)
            for place, row, payload in zip(members, own, payloads, strict=True):
                jobs.append(_Job(patches[place], payload, slide, int(row)))
        share = -(-len(jobs) // self._threads)
        decoding = [decoders.submit(_decode_all, jobs[i : i + share]) for i in range(0, len(jobs), share or 1)]
        return _Loading(rows, patches, decoding)

    def _chunk(self, loading: _Loading) -> Chunk:
        for part in loading.decoding:
            part.result()
        pixels = torch.from_numpy(loading.patches).permute(0, 3, 1, 2)
        positions, changes = np.empty((len(loading.rows), 2), np.float32), []
        for slide, members, own in self._by_slide(loading.rows):
            positions[members] = slide.positions(own)
            if self._augment is not None:
                changes.append((members, replace(self._augment, key=slide.key).changes(own)))
        prepare = joined(changes) if changes else None
        return Chunk(pixels, torch.from_numpy(loading.rows), torch.from_numpy(positions), prepare)

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
    slide: JpegSlide
    row: int


@dataclass(frozen=True)
class _Loading:
    """A chunk whose bytes are read and whose pixels are being filled in."""

    rows: Rows
    patches: Pixels
    decoding: list[Future[None]]


def _decode_all(jobs: Sequence[_Job]) -> None:
    with spending("decode"):
        _decode_each(jobs)


def _decode_each(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        edge = job.out.shape[1]
        try:
            pictures = (job.payload,) if len(job.out) == edge else split(job.payload)
            for place, jpeg in enumerate(pictures):
                out = job.out[place * edge : (place + 1) * edge]
                pixels = simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=out)  # releases the GIL
                if pixels.shape != out.shape:
                    raise _damaged(job, f"it is {pixels.shape[1]} x {pixels.shape[0]} px, not {edge}")
        except ValueError as error:
            raise _damaged(job, str(error)) from error


def _damaged(job: _Job, reason: str) -> DamagedError:
    part, reason = int(job.slide.index().part[job.row]), f"the patch of row {job.row} cannot be decoded ({reason})"
    if part < 0:
        return DamagedError(
            f"{job.slide.uri}: {reason}; set tiling.codec=checked, which leaves such patches "
            "out, copy the slide again, or take it out of the cohort"
        )
    return DamagedError(
        f"{job.slide.uri}, part {part}: {reason}; the store is damaged: remove it and tile again. If `verify` "
        "finds it whole, the slide itself is damaged there: tiling.codec=checked leaves such patches out"
    )
