"""From slides to chunks without a store: Ray Data tiles each slide on the fly and streams it to the rank it is for.

Ray Data's own splitting would hand parts of a slide to every rank (a block goes wherever the fewest rows are). So each
rank streams the slides that the plan gives it, from its own process: read tasks of neighbouring rows, blocks in order.
A slide is whole, its rows are contiguous and in order, on one rank. `readers` bounds what a rank tiles at a time, so
that no rank can take the CPUs that another one waits for.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from torch import Tensor

from ips.bag import Chunk
from pipeline.bags.augment import Augment
from pipeline.bags.patch_bag import PatchBag
from pipeline.bags.streamed import StreamedSlide, cut, open_unchanged
from pipeline.errors import SlideError, StageError
from pipeline.store.index import PatchIndex

TASK_PATCHES = 4096  # patches of a read task: seconds of work, so that several tasks can share a large slide
BLOCK_PATCHES = 64  # 1 to 4 MB of 256 px patches, so that Ray's object store holds little of what is read ahead
BLOCK_BYTES = 8 * 2**20  # Ray Data puts smaller blocks together up to this

STREAM = pa.schema(
    [
        pa.field("place", pa.int32(), nullable=False),  # of the slide in the order that was announced
        pa.field("row", pa.int64(), nullable=False),  # of the slide's patches; -1: `image` is the pickled error instead
        pa.field("image", pa.large_binary(), nullable=False),  # as the store has it
    ]
)

Ints = npt.NDArray[np.int64]


class Feed:
    """The slides that one rank takes, in their order, tiled ahead of use by other CPUs of the cluster.

    Args:
        slides: all training slides, by index.
        cpus: that Ray reserves for each read task.
        readers: read tasks at a time.
    """

    def __init__(self, slides: Sequence[StreamedSlide], *, cpus: float, readers: int) -> None:
        self._slides, self._cpus, self._readers = slides, cpus, readers
        self._due: deque[int] = deque()
        self._stream: Generator[_Block, None, None] | None = None
        self._place = 0

    def announce(self, order: Sequence[int]) -> None:
        """The indices of the slides that will be scored next, in this order; what came before is forgotten."""
        self.close()
        self._due, self._place = deque(order), 0

    def bag(self, index: int, *, threads: int, augment: Augment | None) -> FedBag:
        """A slide's bag; arguments as of `sources.open_bag`."""
        return FedBag(self, index, threads, augment)

    def pass_through(self, index: int) -> _Passing | StreamedSlide:
        """The slide for one pass through its rows: from the stream when it is its turn, else cut in this process."""
        slide = self._slides[index]
        if not self._due or self._due[0] != index:
            return slide
        if self._stream is None:
            due = [self._slides[other] for other in self._due]
            self._stream = _stream(due, cpus=self._cpus, readers=self._readers)
        self._due.popleft()
        passing = _Passing(slide, _rows(self._stream, self._place, slide))
        self._place += 1
        return passing

    def direct(self, index: int) -> StreamedSlide:
        """The slide, whose patches are cut in this process."""
        return self._slides[index]

    def close(self) -> None:
        """Stop tiling."""
        if self._stream is not None:
            self._stream.close()  # and with it Ray's executor
        self._stream = None


class FedBag:
    """A streamed slide as an `ips` bag: chunks from the stream, `take` from the slide itself; the same bytes."""

    def __init__(self, feed: Feed, index: int, threads: int, augment: Augment | None) -> None:
        self._feed, self._index, self._threads, self._augment = feed, index, threads, augment

    def __len__(self) -> int:
        return self._feed.direct(self._index).n_patches

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Every row once, in order.

        Raises:
            SlideError: the slide cannot be used.
            StageError: the stream broke off.
        """
        passing = self._feed.pass_through(self._index)
        return PatchBag([passing], threads=self._threads, augment=self._augment).chunks(size)

    def take(self, rows: Tensor) -> Chunk:
        """The patches of `rows` (n,) int64, in that order."""
        direct = self._feed.direct(self._index)
        return PatchBag([direct], threads=self._threads, augment=self._augment).take(rows)


class _Passing:
    """A slide during one pass through its rows: its patches come once, in order."""

    def __init__(self, slide: StreamedSlide, rows: Iterator[bytes]) -> None:
        self.uri, self.key = slide.uri, slide.key
        self.n_patches, self.patch_px, self.context_mpp = slide.n_patches, slide.patch_px, slide.context_mpp
        self._slide, self._rows, self._next = slide, rows, 0

    def index(self) -> PatchIndex:
        """Where the patches stand."""
        return self._slide.index()

    def positions(self, rows: Ints) -> Ints:
        """See `StoredSlide.positions`."""
        return self._slide.positions(rows)

    def payloads(self, rows: Ints) -> list[bytes]:
        """The JPEGs of `rows`, which go on where the last call ended."""
        assert rows.tolist() == list(range(self._next, self._next + len(rows)))
        self._next += len(rows)
        return [next(self._rows) for _ in rows]


@dataclass(frozen=True)
class _Block:
    """Neighbouring patches of one slide."""

    place: int
    first: int
    images: list[bytes]


def _rows(stream: Iterator[_Block], place: int, slide: StreamedSlide) -> Iterator[bytes]:
    """The patches of the slide whose turn it is.

    Raises:
        SlideError: what the task met that tiled the slide.
        StageError: the stream ends early, or is another slide's or out of order.
    """
    row = 0
    while row < slide.n_patches:
        block = next(stream, None)
        if block is None:
            raise StageError(f"{slide.uri}: its stream ends after {row} of {slide.n_patches} patches; run again")
        if block.first < 0:
            raise pickle.loads(block.images[0])
        if (block.place, block.first) != (place, row):
            raise StageError(
                f"{slide.uri}: row {block.first} of slide {block.place} came in its stream instead of row {row} of "
                f"slide {place}; set train.source=store and report this"
            )
        row += len(block.images)
        yield from block.images


def _stream(slides: Sequence[StreamedSlide], *, cpus: float, readers: int) -> Generator[_Block, None, None]:
    """The blocks of the slides, in order, tiled by Ray while they are consumed."""
    source = _Slides(slides)
    tasks = len(source.get_read_tasks(0))  # asked for as many, Ray Data splits no block further
    dataset = ray.data.read_datasource(source, num_cpus=cpus, concurrency=readers, override_num_blocks=tasks)
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = BLOCK_BYTES
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for batch in table.to_batches():
            yield from _cut_blocks(batch)


def _cut_blocks(batch: pa.RecordBatch) -> Iterator[_Block]:
    """The batch, cut where another slide begins or rows are not neighbours."""
    places, rows = (batch.column(name).to_numpy() for name in ("place", "row"))
    images = batch.column("image").to_pylist()
    starts = [0, *(np.flatnonzero((np.diff(places) != 0) | (np.diff(rows) != 1)) + 1).tolist(), len(batch)]
    for start, stop in pairwise(starts):
        yield _Block(int(places[start]), int(rows[start]), images[start:stop])


class _Slides(Datasource):
    """Read tasks for slides in their order, each a range of a slide's rows."""

    def __init__(self, slides: Sequence[StreamedSlide]) -> None:
        super().__init__()
        self._slides = slides

    def estimate_inmemory_data_size(self) -> None:
        """Unknown: JPEGs are as long as they are."""

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """All of them, whatever `parallelism` would like."""
        return [
            ReadTask(
                partial(_tile, slide, place, first, min(first + TASK_PATCHES, slide.n_patches)),
                BlockMetadata(min(TASK_PATCHES, slide.n_patches - first), None, None, input_files=(slide.uri,)),
                schema=STREAM,
            )
            for place, slide in enumerate(self._slides)
            for first in range(0, slide.n_patches, TASK_PATCHES)
        ]


def _tile(slide: StreamedSlide, place: int, start: int, stop: int) -> Iterator[pa.Table]:
    """Rows `start` to `stop` of a slide; where they end early, the last one holds the error."""
    try:
        with ExitStack() as stack:
            reader = open_unchanged(slide, stack)
            for first in range(start, stop, BLOCK_PATCHES):
                rows = np.arange(first, min(first + BLOCK_PATCHES, stop))
                yield _table(place, rows, list(cut(slide, reader, rows)))
    except SlideError as error:
        yield _table(place, np.array([-1]), [pickle.dumps(error)])


def _table(place: int, rows: Ints, images: list[bytes]) -> pa.Table:
    columns = [np.full(len(rows), place, np.int32), rows, pa.array(images, pa.large_binary())]
    return pa.table(dict(zip(STREAM.names, columns, strict=True)), schema=STREAM)
