"""Slides whose patches are not stored: cut out of the slide whenever they are asked for.

The tile stage commits a plan of each slide, which says where its patches are: a folder as in the patch store, without
parts. The bytes of a patch come from the same code that would have stored them, so they are the same bytes.
"""

from __future__ import annotations

import atexit
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.cohort.table import CohortSlide
from pipeline.columnar import mapped, together
from pipeline.config.data import TilingConfig
from pipeline.config.embed import EmbedConfig
from pipeline.errors import BadTileError, PlanError, SlideError
from pipeline.ingest.isolated import apart
from pipeline.ingest.source import opened, version_of
from pipeline.ingest.versions import Looked, known
from pipeline.slides.identity import reading_source
from pipeline.slides.open import SlideReader
from pipeline.storage import files
from pipeline.storage.files import SourceVersion
from pipeline.store.patches import PLANS, OnPatches, PatchStore, StoredSlide
from pipeline.tiling.cutting import Cutter
from pipeline.tiling.grid import Grid
from pipeline.units import LevelPx, PatchPx

_SHARE = 16_384  # patches that may take `tiling.max_seconds` together, as a share of a large slide may
_LEAST_S = 30.0  # that any few of them may
MAX_OPEN = 2  # slides that a process keeps open; OpenSlide's caches take 32 MB each

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StreamedSlide(OnPatches):
    """A planned slide, as a `sources.PatchSource`. Small and picklable.

    `patches` is the plan that the tile stage committed, without parts; keys are as in the patch store, for the patches
    are the same, all of which must be readable.
    """

    slide: CohortSlide
    spec: TilingConfig
    version: SourceVersion
    """Of the file that was planned."""

    @property
    def uri(self) -> str:
        """The slide's file."""
        return self.slide.uri

    @property
    def patch_px(self) -> int:
        """Edge of a patch."""
        return self.patches.patch_px

    @property
    def context_mpp(self) -> float | None:
        """See `StoredSlide.context_mpp`."""
        return self.patches.context_mpp

    def payloads(self, rows: Sequence[int] | Ints) -> list[bytes]:
        """The JPEGs of `rows`, in their order, cut from the slide here and now.

        Raises:
            SlideError: the slide is gone or was replaced.
            PlanError: it cannot be decoded there.
        """
        with _lock:
            return list(cut(self, _reader(self), np.asarray(rows, np.int64)))


@dataclass(frozen=True)
class PassingSlide(StreamedSlide):
    """A slide that is read once, for a prediction: a process of its own cuts its patches, as it does all of a slide."""

    def payloads(self, rows: Sequence[int] | Ints) -> list[bytes]:
        """As `StreamedSlide.payloads`, and SlideError where the slide breaks that process, or takes it too long."""
        seconds = max(self.spec.max_seconds * len(rows) / _SHARE, min(self.spec.max_seconds, _LEAST_S))
        return apart(self.slide, self.spec, partial(StreamedSlide.payloads, self, np.asarray(rows, np.int64)), seconds)


@dataclass(frozen=True)
class EmbeddedSlide(OnPatches):
    """A slide whose features are made whenever they are asked for, and written nowhere; as a `sources.PatchSource`."""

    pixels: StoredSlide | StreamedSlide
    """What they are made of."""
    config: EmbedConfig
    """By what."""
    encoder: str
    """Its fingerprint."""
    dim: int

    @property
    def key(self) -> str:
        """As in the feature store."""
        return f"{self.patches.key}-{self.encoder}"

    @property
    def uri(self) -> str:
        """Of the pixels."""
        return self.pixels.uri

    def payloads(self, rows: Ints) -> list[bytes]:
        """The patches of `rows` as JPEGs."""
        return self.pixels.payloads(rows)


def plan_root(root: str) -> str:
    """Where plans are committed, below the root of the patch store."""
    return files.join(root, PLANS)


def open_streamed(
    slides: Sequence[CohortSlide],
    versions: Sequence[Looked],
    spec: TilingConfig,
    plans: PatchStore,
    keys: Sequence[str],
) -> Sequence[StreamedSlide]:
    """Slides that the tile stage has planned.

    Args:
        slides: their sources.
        versions: of their files.
        spec: by which they are cut.
        plans: where their plans are.
        keys: of the plans.

    Raises:
        StorageError: a plan is gone.
        SlideError: a slide's file is; "changed", it is not the one that was planned.
    """
    found, current = plans.slides(keys), planned_keys(plans, slides, versions)
    for slide, version, planned, key in zip(slides, versions, keys, current, strict=True):
        if isinstance(version, SlideError):
            raise version
        if key != planned:
            raise SlideError("changed", f"{slide.uri}: the file was replaced after it was planned; run again")
    return mapped(_Streamed(spec), together(together(slides, found), versions))


@dataclass(frozen=True)
class _Streamed:
    """Makes a slide of its row, its plan, and the version of its file."""

    spec: TilingConfig

    def __call__(self, found: tuple[tuple[CohortSlide, StoredSlide], Looked]) -> StreamedSlide:
        (slide, plan), version = found
        assert isinstance(version, SourceVersion)
        return StreamedSlide(plan, slide, self.spec, version)


def planned_keys(plans: PatchStore, slides: Sequence[CohortSlide], versions: Sequence[Looked]) -> list[str | None]:
    """Keys of the plans of these versions of the slides' files: another picture's patches stand elsewhere."""
    statuses = plans.statuses(slides, known(versions))
    return [None if status is None else status.key for status in statuses]


def cut(streamed: StreamedSlide, reader: SlideReader, rows: Ints) -> Iterator[bytes]:
    """The JPEGs of `rows` of an open slide.

    Raises:
        PlanError: one of them cannot be decoded.
    """
    plan, origins = streamed.patches, streamed.patches.origins()[rows]
    downsample = reader.levels[plan.level].downsample
    edge = LevelPx(round(plan.extent / downsample))
    grid = Grid(plan.level, downsample, edge, edge, PatchPx(plan.patch_px), 1, plan.n_patches, (0, 0))
    with reading_source():
        images = Cutter(reader, grid, streamed.spec).each(origins)
        for row, image in zip(rows.tolist(), images, strict=True):
            if isinstance(image, BadTileError):
                raise PlanError(
                    streamed.key, f"{streamed.uri}: the patch of row {row} cannot be decoded ({image})"
                ) from image
            yield image


def open_unchanged(streamed: StreamedSlide, stack: ExitStack) -> SlideReader:
    """The slide, open until the stack ends.

    Raises:
        SlideError: "changed", the file is not the one that was planned.
    """
    if version_of(streamed.slide, streamed.spec) != streamed.version:
        raise SlideError("changed", f"{streamed.uri}: the file was replaced while it was trained on; run again")
    return stack.enter_context(opened(streamed.slide, streamed.spec))


_lock = threading.Lock()  # readers are not thread-safe, and chunks are read in a thread of their own
_open: OrderedDict[tuple[str, int | None, SourceVersion], tuple[SlideReader, ExitStack]] = OrderedDict()


def _reader(streamed: StreamedSlide) -> SlideReader:
    """The slide, kept open for the next call: the winners are taken from the slide that was just scored."""
    name = streamed.uri, streamed.slide.series, streamed.version
    if name not in _open:
        with ExitStack() as stack:
            _open[name] = open_unchanged(streamed, stack), stack.pop_all()
        while len(_open) > MAX_OPEN:
            _open.popitem(last=False)[1][1].close()
    _open.move_to_end(name)
    return _open[name][0]


@atexit.register
def _close() -> None:
    """Close all, while OpenSlide can: a process that ends takes it apart before what is still open."""
    while _open:
        _open.popitem()[1][1].close()
