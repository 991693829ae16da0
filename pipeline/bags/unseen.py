"""Slides that no stage has seen: at hand while something is made of them, of one alone or of a patient's together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import accumulate, pairwise
from typing import TypeVar

import torch

from pipeline.bags.embed import embed_slide, encoder_fingerprint, shared_embedder
from pipeline.bags.given import open_given
from pipeline.bags.images import open_image
from pipeline.bags.patients import OneSlide, PatientSlides
from pipeline.bags.sources import BagSource, Source, check_width, feature_store
from pipeline.bags.streamed import EmbeddedSlide, PassingSlide, StreamedSlide
from pipeline.cohort.table import CohortSlide
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError, PlanError, SlideError
from pipeline.ingest.features import index_slide
from pipeline.ingest.isolated import begin_slide, store_slide
from pipeline.ingest.source import version_of
from pipeline.ingest.tiler import LargeSlide
from pipeline.ingest.versions import look_at
from pipeline.storage.scratch import scratch_folder
from pipeline.store.catalogue import GRACE_S
from pipeline.store.patches import PatchStore, SlideStatus, StoredSlide
from pipeline.store.rows import asked_digest

Made = TypeVar("Made")

_LOOK_S = GRACE_S / 6  # files that a look has seen are there for `GRACE_S`


def read_together(
    config: Config,
    slides: Sequence[CohortSlide],
    use: Callable[[Sequence[Source]], Made],
    store: PatchStore | None = None,
) -> Made:
    """What is made of slides that are at hand all at once, as the config's model takes them.

    Args:
        config: of the model.
        slides: that no stage has seen.
        use: makes it; is called again where a patch was found that cannot be decoded, with such left out.
        store: whose patches are taken where it has them; of the config's `tiling`.

    Raises:
        SlideError: one of them cannot be read or used; of several it says which.
    """
    try:
        with _opened(passing, config, slides, store) as sources:
            return use(sources)
    except PlanError:
        with _opened(tiled, config, slides, store) as sources:
            return use(sources)


_Reading = Callable[[Config, CohortSlide, PatchStore | None], AbstractContextManager[tuple[Source, str]]]


@contextmanager
def _opened(
    reading: _Reading, config: Config, slides: Sequence[CohortSlide], store: PatchStore | None
) -> Iterator[list[Source]]:
    with ExitStack() as stack:
        sources = []
        for slide in slides:
            try:
                source, _ = stack.enter_context(reading(config, slide, store))
                sources.append(embedded(config, source))
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


@contextmanager
def passing(config: Config, slide: CohortSlide, store: PatchStore | None = None) -> Iterator[tuple[Source, str]]:
    """As `tiled`, but a slide that is not in the store is cut while it is read, and nothing of it written.

    Errors as `tiled`; and PlanError when a patch cannot be decoded, which `tiled` leaves out.
    """
    there = None if store is None or config.cohort.megapixel_mnist is not None else known(config, slide, store)
    if config.cohort.megapixel_mnist is not None or config.given_features or there is not None:
        with tiled(config, slide, store) as found:
            yield found
        return
    with scratch_folder() as folder:
        version = version_of(slide, config.tiling)
        status = _good(begin_slide(slide, config.tiling, str(folder), pixels=False))
        plan = PatchStore(str(folder), config.tiling.fingerprint()).slide(str(status.key))
        yield PassingSlide(plan, slide, config.tiling, version), str(folder)


@contextmanager
def tiled(config: Config, slide: CohortSlide, store: PatchStore | None = None) -> Iterator[tuple[Source, str]]:
    """The slide's pixels for as long as this lasts, and a folder for what is made of them meanwhile.

    Where `store`, which is of the config's `tiling`, has this version of the slide they are that one's.

    Raises:
        SlideError: the slide cannot be read or used.
    """
    if config.cohort.megapixel_mnist is not None:
        yield open_image(config.cohort.megapixel_mnist, config.tiling, slide.uri), ""
        return
    with scratch_folder() as folder:
        scratch, plans = str(folder), store
        stored = None if store is None else known(config, slide, store)
        if plans is None or stored is None:
            make = index_slide if config.given_features else store_slide
            status, plans = make(slide, config.tiling, scratch), PatchStore(scratch, config.tiling.fingerprint())
            stored = plans.slide(str(_good(status).key))
        if config.given_features:
            given = open_given([slide], look_at([slide], config.tiling), plans, [stored.key])
            try:
                check_width(config, given)
            except ConfigError as error:  # of this file, where the others may be right
                raise SlideError("features", error.problems[0]) from error
            yield given[0], scratch
        else:
            yield stored, scratch


def _good(status: SlideStatus | LargeSlide) -> SlideStatus:
    """The status of a slide that is committed; SlideError where it is not."""
    assert isinstance(status, SlideStatus)
    if status.key is None:
        reason, _, message = str(status.reason).partition(": ")
        raise SlideError(reason, message)
    return status


def known(config: Config, slide: CohortSlide, store: PatchStore) -> StoredSlide | None:
    """This version of the slide as it is committed in a patch store, of which the look is at most `_LOOK_S` old."""
    store.look_again_after(_LOOK_S)
    key = store.key_of(asked_digest(slide, version_of(slide, config.tiling)))
    return None if key is None else store.slide(key)


def featured(config: Config, source: Source, scratch: str) -> Source:
    """What the config's model takes of a slide whose pixels are at hand: these, or features made below `scratch`."""
    if config.model.encoder.name != "features" or not isinstance(source, StoredSlide):
        return source
    store, settings = feature_store(config, scratch)
    features = embed_slide(shared_embedder(settings), source, store, torch.get_num_threads())
    check_width(config, [features])
    return features


def embedded(config: Config, source: Source) -> Source:
    """As `featured`, for one reading: features are made whenever they are asked for, and written nowhere."""
    if config.model.encoder.name != "features" or not isinstance(source, StoredSlide | StreamedSlide):
        return source
    assert config.embed is not None  # the config refuses features of nowhere
    patches = source.patches if isinstance(source, StreamedSlide) else source
    dim = shared_embedder(config.embed).dim * (1 if patches.context_mpp is None else 2)
    slide = EmbeddedSlide(patches, source, config.embed, encoder_fingerprint(config.embed), dim)
    check_width(config, [slide])
    return slide
