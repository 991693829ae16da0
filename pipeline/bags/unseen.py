"""Slides that no stage has seen: at hand while something is made of them, of one alone or of a patient's together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import accumulate, pairwise
from typing import TypeVar

from pipeline.bags.patients import OneSlide, PatientSlides
from pipeline.bags.sources import BagSource, Source, featured, passing, tiled
from pipeline.cohort.table import CohortSlide
from pipeline.config.recipe import Config
from pipeline.errors import PlanError, SlideError

Made = TypeVar("Made")


def read_together(
    config: Config, slides: Sequence[CohortSlide], use: Callable[[Sequence[Source]], Made], store: str | None = None
) -> Made:
    """What is made of slides that are at hand all at once, as the config's model takes them.

    Args:
        config: of the model.
        slides: that no stage has seen.
        use: makes it; is called again where a patch was found that cannot be decoded, with such left out.
        store: root of a patch store, whose patches are taken where it has them.

    Raises:
        SlideError: one of them cannot be read or used; of several it says which.
    """
    try:
        with _opened(passing, config, slides, store) as sources:
            return use(sources)
    except PlanError:
        with _opened(tiled, config, slides, store) as sources:
            return use(sources)


_Reading = Callable[[Config, CohortSlide, str | None], AbstractContextManager[tuple[Source, str]]]


@contextmanager
def _opened(
    reading: _Reading, config: Config, slides: Sequence[CohortSlide], store: str | None
) -> Iterator[list[Source]]:
    with ExitStack() as stack:
        sources = []
        for slide in slides:
            try:
                sources.append(featured(config, *stack.enter_context(reading(config, slide, store))))
            except SlideError as error:
                if len(slides) > 1:
                    raise SlideError(error.reason, of_patient(slide.slide_id, str(error))) from error
                raise
        yield sources


def of_patient(slide_id: str, message: str) -> str:
    """What is wrong with a slide, said of all of its patient."""
    return f"slide {slide_id!r} of this patient: {message}"


def as_one(slides: Sequence[CohortSlide], sources: Sequence[Source]) -> BagSource:
    """The bag of a patient's slides; of one slide its own."""
    if len(sources) == 1:
        return sources[0]
    parts = [source for source in sources if isinstance(source, OneSlide)]
    assert len(parts) == len(sources)  # the config refuses others
    return PatientSlides(tuple(slide.slide_id for slide in slides), tuple(parts))


def rows_of(sources: Sequence[Source]) -> list[slice]:
    """Where the patches of each are among those of all."""
    ends = [0, *accumulate(source.n_patches for source in sources)]
    return [slice(first, last) for first, last in pairwise(ends)]
