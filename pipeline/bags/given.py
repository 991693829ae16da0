"""Features that other tools have made, read by ranges from the files that they lie in.

The tile stage commits a plan of each file (`pipeline.ingest.features`), which says where its patches are on the slide
and its vectors in the file. There are no pixels: pictures for people show where the patches are.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageDraw

from pipeline.cohort.table import CohortSlide
from pipeline.columnar import Columnar
from pipeline.errors import SlideError, StageError
from pipeline.ingest.versions import Looked, known
from pipeline.storage import files
from pipeline.storage.ranges import coalesced
from pipeline.store.features import Dtype, Features
from pipeline.store.index import Ints
from pipeline.store.patches import OnPatches, PatchStore, StoredSlide

_ABOUT = pa.schema([("uri", pa.string()), ("dim", pa.int64()), ("dtype", pa.string())])
_About = tuple[int, Dtype]
_TILE_PX = 96  # of what stands for a patch without pixels
_TILE = (214, 176, 200)


@dataclass(frozen=True)
class GivenSlide(OnPatches):
    """A slide's features in a file that another tool has written, as a `sources.PatchSource`. Small and picklable.

    `patches` is the plan that the tile stage committed; its index leads into the file.
    """

    uri: str
    """The file."""
    dim: int
    dtype: Dtype

    def vectors(self, rows: Ints) -> Features:
        """(n, D) of `rows`, in their order; neighbours are read in one request.

        Raises:
            StorageError: the file cannot be read, or has become shorter.
        """
        index, wanted = self.index(), np.unique(rows)
        runs = coalesced(zip(index.offset[wanted].tolist(), index.length[wanted].tolist(), strict=True))
        blocks = files.read_ranges(self.uri, [(run[0][0], sum(run[-1]) - run[0][0]) for run in runs])
        found = [
            np.frombuffer(block, self.dtype, self.dim, start - run[0][0])
            for run, block in zip(runs, blocks, strict=True)
            for start, _ in run
        ]
        order = np.argsort(index.offset[wanted])  # as `coalesced` puts them
        vectors: npt.NDArray[Any] = np.empty((len(wanted), self.dim), self.dtype)
        vectors[order] = found
        return vectors[np.searchsorted(wanted, rows)]

    def payloads(self, rows: Ints) -> list[bytes]:
        """A tile that says its row, in the place of each patch."""
        return [_tile(int(row)) for row in rows]


def open_given(
    slides: Sequence[CohortSlide], versions: Sequence[Looked], plans: PatchStore, keys: Sequence[str]
) -> Sequence[GivenSlide]:
    """Files that the tile stage has indexed.

    Args:
        slides: their rows.
        versions: of their files.
        plans: where their plans are.
        keys: of the plans.

    Raises:
        StorageError: a plan is gone.
        SlideError: a file is; "changed", it is not the one that was indexed.
    """
    plan, current = plans.slides(keys), plans.statuses(slides, known(versions))
    kinds: dict[_About, _About] = {}  # few, where the cohort is large
    about = {key: kinds.setdefault(kind, kind) for key, _, kind in _features(plans, keys)}
    for slide, version, status, key in zip(slides, versions, current, keys, strict=True):
        if isinstance(version, SlideError):
            raise version
        if status is None or status.key != key:
            raise SlideError("changed", f"{slide.uri}: the file was replaced after it was indexed; run again")
    rows = ((slide.uri, *about[key]) for slide, key in zip(slides, keys, strict=True))
    return plan.paired(Columnar.of(rows, _ABOUT, _about)).map(_given)


def _about(uri: str, dim: int, dtype: Dtype) -> tuple[str, int, Dtype]:
    return uri, dim, dtype


def _given(found: tuple[StoredSlide, tuple[str, int, Dtype]]) -> GivenSlide:
    return GivenSlide(found[0], *found[1])


def check_alike(plans: PatchStore, keys: Collection[str]) -> None:
    """Whether files that are to be one cohort come from one encoder.

    Raises:
        StageError: they differ in it, or in the width or the kind of their numbers.
    """
    kinds = Counter((encoder, *about) for _, encoder, about in _features(plans, sorted(set(keys))))
    named = {encoder for encoder, _, _ in kinds if encoder is not None}
    if len(named) > 1 or len({kind[1:] for kind in kinds}) > 1:
        told = "; ".join(
            f"{count} files of {dim} x {dtype} by {encoder or 'an encoder they do not name'}"
            for (encoder, dim, dtype), count in kinds.most_common()
        )
        raise StageError(f"features of several encoders in one cohort: {told}; keep those of one")


def _features(plans: PatchStore, keys: Sequence[str]) -> Iterator[tuple[str, str | None, _About]]:
    """Key, encoder where the file names one, width and kind of numbers; of each slide, in no order."""
    for key, facts in plans.all_facts(keys):
        found = facts["features"]
        yield key, found["encoder"], (found["dim"], found["dtype"])


def _tile(row: int) -> bytes:
    image = Image.new("RGB", (_TILE_PX, _TILE_PX), _TILE)
    ImageDraw.Draw(image).text((6, 36), f"row {row}\nno pixels", fill=(90, 60, 80))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90)
    return sink.getvalue()
