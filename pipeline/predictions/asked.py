"""Which slides are asked for: files, folders, prefixes in a bucket, and cohorts, each under an id of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from pipeline.cohort.patients import bag_name, check_specimens
from pipeline.cohort.table import CohortSlide, read_cohort
from pipeline.config.recipe import Config
from pipeline.errors import StageError, StorageError
from pipeline.slides.folders import SUFFIX, is_folder, place_of, slides_in
from pipeline.slides.names import apart, name_of
from pipeline.storage.files import is_remote, is_temporary, join, parent
from pipeline.storage.tree import walk

log = logging.getLogger(__name__)

SUFFIXES = frozenset({"svs", "tif", "tiff", "qptiff", "ndpi", "mrxs", "scn", "bif", "svslide", "vms"})
"""Of what is taken for a slide in a folder, beside series of DICOM files. Plain images are none: they are mostly
thumbnails."""


@dataclass(frozen=True)
class Asked:
    """A slide that is asked for."""

    slide: CohortSlide
    mpp_remedy: str
    """Where its microns per px can be given."""
    patient: str | None = None
    """Whose it is, of those that a cohort lists."""

    def bag(self, config: Config) -> str | None:
        """Name of the bag that a model of patients takes it in; None: it comes alone."""
        return None if self.patient is None else bag_name(self.slide, config.cohort.specimen)


def asked_slides(
    uris: Sequence[str], cohort: str | None, *, mpp: float | None = None, series: int | None = None
) -> list[Asked]:
    """The slides of URIs, then those of a cohort.

    Args:
        uris: of slides, of folders, or of prefixes in a bucket (which end with `/`); an id is a file's name without
            suffix, or that of a folder which holds the DICOM files of one slide, made unique by a number.
        cohort: URI of a CSV or Parquet with slide_id and uri; labels are not needed.
        mpp: microns per level-0 px of `uris`, over what their files state.
        series: number of the image to take of each of the `uris`' files; None: the one that is the slide.

    Raises:
        StageError: nothing is asked for.
        CohortError: the cohort is wrong.
    """
    listed = read_cohort(cohort).slides if cohort else ()
    found = list(chain.from_iterable(map(_below, uris)))
    named = _named(found, mpp, series, {slide.slide_id for slide in listed})
    asked = [Asked(slide, "with --mpp, as in --mpp 0.25") for slide in named]
    asked += [Asked(slide, "in the cohort's mpp column", slide.patient_id) for slide in listed]
    if not asked:
        raise StageError("predict: no slides; name slides, folders or prefixes, or give --cohort")
    return asked


def check_bags(asked: Sequence[Asked], config: Config, cohort: str | None) -> None:
    """CohortError where a model of patients cannot tell which slides of a cohort are one bag."""
    if config.cohort.bag == "patient" and cohort is not None:
        check_specimens(cohort, [one.slide for one in asked if one.patient is not None], config.cohort.specimen)


def _below(uri: str) -> list[str]:
    """The slides that a URI means."""
    place = _place(uri)
    if not _is_folder(uri, place):
        return [uri]
    names = [found.uri for found in walk(place) if not is_temporary(found.uri.rpartition("/")[2])]
    slides = [name for name in names if _suffix(name) in SUFFIXES]
    parts: dict[str, list[str]] = {}
    for name in names:
        if name.lower().endswith(SUFFIX):
            parts.setdefault(parent(name), []).append(name.rpartition("/")[2])
    for folder, own in parts.items():
        slides += _series(folder, own)
    if not slides:
        known = ", ".join(sorted([*SUFFIXES, SUFFIX.removeprefix(".")]))
        log.warning("predict: %s is a folder and holds no slide (%s)", uri, known)
    return sorted(slides) or [uri]  # whose row then says so


def _series(folder: str, names: Sequence[str]) -> list[str]:
    """The slides that DICOM files of a folder are of: the folder where they are of one, else a file of each."""
    found = slides_in(folder, names)
    others = len(names) - sum(len(one.names) for one in found)
    if others:
        log.warning("predict: %s: %d DICOM files are left out: they are no images of slides", folder, others)
    if len(found) == 1:
        return [join(folder, "") if is_remote(folder) else folder]
    return [join(folder, one.names[0]) for one in found]


def _is_folder(uri: str, place: str) -> bool:
    try:
        return is_folder(place)
    except (StorageError, ValueError):  # it means no place: its row says so
        return False


def _suffix(uri: str) -> str:
    return uri.rpartition("/")[2].rpartition(".")[2].lower()


def _named(uris: Sequence[str], mpp: float | None, series: int | None, taken: set[str]) -> Iterator[CohortSlide]:
    """Slides under their file's name, with the first number that makes it another than those `taken`."""
    names = (as_text(name_of(uri, folder=_is_folder(uri, _place(uri)))) for uri in uris)
    for uri, slide_id in zip(uris, apart(names, taken), strict=True):
        yield CohortSlide(slide_id, _place(uri), slide_id, None, mpp, {}, {}, series=series)


def _place(uri: str) -> str:
    """The absolute URI; one that means no place as it is, for its slide's error to say so."""
    try:
        return place_of(uri)
    except StorageError:
        return uri


def as_text(name: str) -> str:
    """A name as Unicode, which those of files need not be."""
    return name.encode(errors="backslashreplace").decode()
