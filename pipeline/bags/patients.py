"""All slides of a patient as one bag: patches of several slides in one selection, one prediction for each patient.

Rows of the slides follow one another, in the cohort's order. For pictures the slides lie side by side on one plane,
each in px of which a patch has as many as on the first slide; on its own slide a patch is where `within` says.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from PIL import Image

from pipeline.bags.given import GivenSlide
from pipeline.bags.streamed import EmbeddedSlide, StreamedSlide
from pipeline.cohort.patients import bag_name
from pipeline.cohort.table import CohortSlide
from pipeline.store.features import FeatureSlide
from pipeline.store.index import Ints
from pipeline.store.patches import StoredSlide

OneSlide = StoredSlide | FeatureSlide | GivenSlide | StreamedSlide | EmbeddedSlide
_GAP = 16  # px of the picture between two slides
_THUMBNAIL_PX = 512
_MIXED = "several"  # of another column, in which a patient's slides differ


@dataclass(frozen=True)
class Places:
    """Left and upper edges of patches, (n,) each."""

    x: Ints
    y: Ints


@dataclass(frozen=True)
class PatientSlides:
    """The slides of one patient as a `sources.PatchSource`: small and picklable."""

    names: tuple[str, ...]
    """Ids of the slides."""
    slides: tuple[OneSlide, ...]

    @property
    def key(self) -> str:
        """Names the content: that of a single slide is its own."""
        keys = [slide.key for slide in self.slides]
        return keys[0] if len(keys) == 1 else hashlib.sha256("\n".join(keys).encode()).hexdigest()[:32]

    @property
    def n_patches(self) -> int:
        """N of all slides."""
        return sum(slide.n_patches for slide in self.slides)

    @property
    def n_bad_tiles(self) -> int:
        """Of all slides."""
        return sum(slide.n_bad_tiles for slide in self.slides)

    @property
    def extent(self) -> float:
        """Edge of a patch, px of the plane: level-0 px of the first slide."""
        return self.slides[0].extent

    @property
    def mpp(self) -> float | None:
        """Microns per px of the plane."""
        return self.slides[0].mpp

    @property
    def thumbnail_scale(self) -> float:
        """Px of the plane per px of the picture."""
        widest = max(self._size(slide)[0] for slide in self.slides)
        tallest = max(self._size(slide)[1] for slide in self.slides)
        return max(1.0, max(widest, tallest) / _THUMBNAIL_PX)

    def within(self, rows: Ints) -> Iterator[tuple[int, Ints, Ints]]:
        """Number of each slide that `rows` (n,) fall in, which of them do, and their rows within it."""
        starts = np.array([0, *accumulate(slide.n_patches for slide in self.slides)], np.int64)
        owners = np.searchsorted(starts, rows, side="right") - 1
        for number in np.unique(owners).tolist():
            members = np.flatnonzero(owners == number)
            yield number, members, rows[members] - starts[number]

    def index(self) -> Places:
        """Where the patches stand on the plane."""
        xs, ys = [], []
        for slide, left in zip(self.slides, self._lefts(), strict=True):
            index, scale = slide.index(), self.extent / slide.extent
            xs.append(np.rint(index.x * scale + left * self.thumbnail_scale).astype(np.int64))
            ys.append(np.rint(index.y * scale).astype(np.int64))
        return Places(np.concatenate(xs), np.concatenate(ys))

    def payloads(self, rows: Ints) -> list[bytes]:
        """The patches of `rows` as JPEGs, in their order."""
        found: dict[int, bytes] = {}
        for number, members, own in self.within(np.asarray(rows, np.int64)):
            found |= zip(members.tolist(), self.slides[number].payloads(own), strict=True)
        return [found[place] for place in range(len(rows))]

    def thumbnail(self) -> bytes:
        """The slides side by side, a JPEG each of which takes at most 512 px."""
        tiles = []
        for slide in self.slides:
            with Image.open(io.BytesIO(slide.thumbnail())) as picture:
                tiles.append(picture.convert("RGB").resize(self._shown(slide), Image.Resampling.BOX))
        lefts = self._lefts()
        whole = Image.new("RGB", (lefts[-1] + tiles[-1].width, max(tile.height for tile in tiles)), (255, 255, 255))
        for tile, left in zip(tiles, lefts, strict=True):
            whole.paste(tile, (left, 0))
        sink = io.BytesIO()
        whole.save(sink, "JPEG", quality=90)
        return sink.getvalue()

    def _size(self, slide: OneSlide) -> tuple[float, float]:
        """Width and height on the plane."""
        stored = slide if isinstance(slide, StoredSlide) else slide.patches
        scale = self.extent / slide.extent
        return stored.dimensions[0] * scale, stored.dimensions[1] * scale

    def _shown(self, slide: OneSlide) -> tuple[int, int]:
        """Width and height in the picture, px."""
        width, height = self._size(slide)
        return max(1, round(width / self.thumbnail_scale)), max(1, round(height / self.thumbnail_scale))

    def _lefts(self) -> list[int]:
        """Where each slide begins in the picture, px."""
        return [0, *accumulate(self._shown(slide)[0] + _GAP for slide in self.slides[:-1])]


def by_patient(
    pairs: Sequence[tuple[CohortSlide, OneSlide]], specimen: str | None = None
) -> list[tuple[CohortSlide, PatientSlides]]:
    """One row a patient, or, by the column `specimen`, a specimen of one, in the order of their first slides.

    Its id is `cohort.patients.bag_name`.
    """
    groups: defaultdict[str, list[tuple[CohortSlide, OneSlide]]] = defaultdict(list)
    for slide, source in pairs:
        groups[bag_name(slide, specimen)].append((slide, source))
    found = []
    for name, group in groups.items():
        slides, sources = [slide for slide, _ in group], [source for _, source in group]
        found.append((merged(slides, name), PatientSlides(tuple(slide.slide_id for slide in slides), tuple(sources))))
    return found


def merged(slides: Sequence[CohortSlide], name: str) -> CohortSlide:
    """The row of a bag of this name: the labels that any slide has, and of other columns what all slides have."""
    first = slides[0]
    labels = {  # which agree where there are several (`cohort.patients`)
        task: next((slide.labels[task] for slide in slides if slide.labels[task] is not None), None)
        for task in first.labels
    }
    extra = {
        name: value if all(slide.extra.get(name) == value for slide in slides) else _MIXED
        for name, value in first.extra.items()
    }
    return replace(first, slide_id=name, labels=labels, extra=extra)
