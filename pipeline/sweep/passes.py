"""What is still to be scored, packed into as few readings of the slides as the memory for models allows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pipeline.cohort.table import CohortSlide
from pipeline.sweep.cells import Cell, Scoring
from pipeline.sweep.scoring import Pass, Task

_GIB = 2**30
_COPIES = 2  # of a model's weights in a process: its own, and the one that scores


@dataclass(frozen=True)
class Reading:
    """One pass over slides."""

    work: Pass
    tasks: tuple[Task, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that are held at once."""
        return tuple(dict.fromkeys(scoring.model.name for scoring in self.work.scorings))

    @property
    def bytes(self) -> int:
        """That they take in a process."""
        return _held(self.work.scorings)


def readings(
    cells: Sequence[Cell], done: Mapping[str, Collection[str]], gib: float, store: str | None
) -> list[Reading]:
    """The passes that are needed; each slide once in each, whichever cohorts list it.

    Args:
        cells: all that is asked.
        done: digest of a scoring -> sources that have its row.
        gib: for the models of one process.
        store: root of the patch store.
    """
    wanted: defaultdict[str, dict[str, CohortSlide]] = defaultdict(dict)
    scorings: dict[str, Scoring] = {}
    for cell in cells:
        digest = cell.scoring.digest
        for slide, source in zip(cell.cohort.slides, cell.cohort.sources, strict=True):
            if source not in done[digest]:
                scorings[digest] = cell.scoring
                wanted[digest].setdefault(source, slide)
    by_pixels: defaultdict[str, list[Scoring]] = defaultdict(list)
    for scoring in scorings.values():
        by_pixels[scoring.pixels].append(scoring)
    packed = [part for group in by_pixels.values() for part in _packed(group, gib)]
    return [Reading(Pass(tuple(part), store), _tasks(part, wanted)) for part in packed]


def _packed(scorings: Sequence[Scoring], gib: float) -> list[list[Scoring]]:
    """In their order, as many as fit; one that does not fit alone is on its own."""
    parts: list[list[Scoring]] = []
    for scoring in scorings:
        if parts and _held([*parts[-1], scoring]) <= gib * _GIB:
            parts[-1].append(scoring)
        else:
            parts.append([scoring])
    return parts


def _held(scorings: Sequence[Scoring]) -> int:
    return _COPIES * sum({scoring.model.digest: scoring.model.bytes for scoring in scorings}.values())


def _tasks(scorings: Sequence[Scoring], wanted: Mapping[str, Mapping[str, CohortSlide]]) -> tuple[Task, ...]:
    slides: dict[str, CohortSlide] = {}
    takers: defaultdict[str, list[str]] = defaultdict(list)
    for scoring in scorings:
        for source, slide in wanted[scoring.digest].items():
            slides.setdefault(source, slide)
            takers[source].append(scoring.digest)
    return tuple(Task(slide, source, tuple(takers[source])) for source, slide in slides.items())
