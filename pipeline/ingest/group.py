"""A task's slides together: the small ones in packs, and all of them committed by few files of the catalogue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from pipeline.ingest.tiler import ReadSlide
from pipeline.storage import files
from pipeline.store.catalogue import Row
from pipeline.store.packs import PACK_BYTES, SmallSlide, pack_uri, write_pack
from pipeline.store.patches import PatchStore, SlideStatus
from pipeline.store.rows import slide_row, source_row
from pipeline.telemetry import spending

Keys = npt.NDArray[np.bytes_]
"""(n,) of slides, ascending."""


class Group:
    """Slides that are done and wait to be committed.

    Args:
        patches: where to.
        known: keys of slides that are committed already; small ones among them are not packed again.
    """

    def __init__(self, patches: PatchStore, known: Keys) -> None:
        self._patches, self._known = patches, known
        self._small: dict[str, SmallSlide] = {}
        self._bytes = 0
        self._rows: list[Row] = []
        self._done: list[tuple[int, SlideStatus]] = []

    @property
    def is_full(self) -> bool:
        """Whether it holds as many bytes as a pack should have."""
        return self._bytes >= PACK_BYTES

    def __len__(self) -> int:
        """Slides that wait."""
        return len(self._done)

    def add(self, number: int, slide: ReadSlide) -> None:
        """A small slide that is read; one of the same content as another is stored once."""
        if slide.small.key not in self._small and not _is_in(self._known, slide.small.key):
            self._small[slide.small.key] = slide.small
            self._bytes += slide.small.bytes
        self.add_status(number, slide.status, [source_row(slide.slide, slide.version, asdict(slide.status), None)])

    def add_status(self, number: int, status: SlideStatus, rows: Sequence[Row]) -> None:
        """A slide that is final, with what the catalogue is to say of it."""
        self._done.append((number, status))
        self._rows += rows

    def commit(self) -> Iterator[tuple[int, SlideStatus]]:
        """Write the pack and commit; numbers and statuses of all slides since the last time.

        Raises:
            StorageError: the store cannot be written; none of them is committed.
        """
        slides = list(self._small.values())
        if slides:
            pack = write_pack(slides)
            with spending("write"):
                files.write_bytes(pack_uri(self._patches.uri, pack.name), pack.data)
            self._rows += [slide_row(one.facts, pack.name, pack.places[one.key].json()) for one in slides]
        self._patches.append(self._rows)
        done = self._done
        self._small, self._bytes, self._rows, self._done = {}, 0, [], []
        yield from done


def _is_in(keys: Keys, key: str) -> bool:
    at = int(np.searchsorted(keys, key.encode()))
    return at < len(keys) and keys[at] == key.encode()
