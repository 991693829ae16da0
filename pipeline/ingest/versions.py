"""Which state the files of a whole cohort are in, asked once for all stages of a command."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.ingest.source import version_of
from pipeline.progress import progress
from pipeline.storage.files import SourceVersion
from pipeline.storage.listing import Ask, ask_all
from pipeline.tiling.guide import may_guide

log = logging.getLogger(__name__)

THREADS = 16  # they wait on the storage
TOGETHER = 512  # slides handed to a thread: handing one over costs as much as looking at it

Looked = SourceVersion | SlideError
"""The state of a slide's files, or why one of them cannot be reached."""


def look_at(slides: Sequence[CohortSlide], spec: TilingConfig) -> list[Looked]:
    """The versions of all slides, their masks and coordinates included; on S3 a request for a thousand files."""
    ask = ask_all(uri for slide in slides for uri in (slide.uri, *may_guide(slide, spec)))
    size = max(1, min(TOGETHER, -(-len(slides) // THREADS)))  # formats of several files ask for each slide
    portions = [slides[start : start + size] for start in range(0, len(slides), size)]
    found: list[Looked] = []
    with progress("tile", len(slides), "files looked at") as steps, ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(lambda portion: [_look(slide, spec, ask) for slide in portion], portions):
            found += part
            steps.advance(len(part))
    _warn_unreachable(found)
    return found


def _warn_unreachable(versions: Sequence[Looked]) -> None:
    by_reason: defaultdict[str, list[SlideError]] = defaultdict(list)
    for version in versions:
        if isinstance(version, SlideError):
            by_reason[version.reason].append(version)
    for reason, errors in by_reason.items():
        log.warning("%s: %d of %d slides, such as: %s", reason, len(errors), len(versions), errors[0])


def _look(slide: CohortSlide, spec: TilingConfig, ask: Ask) -> Looked:
    try:
        return version_of(slide, spec, ask)
    except SlideError as error:
        return SlideError(error.reason, str(error))  # without its traceback, of which a million take gigabytes
