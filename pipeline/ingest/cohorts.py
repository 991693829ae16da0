"""A config's cohort, with the files that its rows stand for: slides, or features that other tools have made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.cohort.table import Cohort, CohortSlide, read_cohort
from pipeline.columnar import Columnar
from pipeline.config.data import CohortConfig, TaskConfig
from pipeline.config.recipe import Config
from pipeline.errors import CohortError
from pipeline.formats.feature_files import SUFFIXES
from pipeline.formats.hdf5 import load_h5py
from pipeline.storage import files
from pipeline.tiling.interchange import file_stem


def listed(config: Config, tasks: Sequence[TaskConfig] = ()) -> Cohort:
    """The config's cohort; where its features are given, each row's `uri` is that of its file of features.

    Raises:
        CohortError: as `read_cohort`; a row names no file of features, and the config no folder.
        StorageError: as there.
    """
    cohort = read_cohort(config.cohort.uri, tasks)
    return replace(cohort, slides=located(config.cohort, cohort.slides)) if config.given_features else cohort


def located(cohort: CohortConfig, slides: Sequence[CohortSlide]) -> Sequence[CohortSlide]:
    """Rows that stand for their files of features: the cohort's column, else the file in the folder that bears the
    slide's id, as `export` writes it, or its file's name; else `uri` itself, where it is such a file.

    Raises:
        ConfigError: h5py is not installed.
        CohortError: a row has none of them.
    """
    folder = cohort.features
    there = set() if folder is None else set(files.list_names(folder))
    uris, lacking = [], []
    for slide in slides:
        uri = slide.features
        if uri is None and slide.uri.endswith(SUFFIXES):
            uri = slide.uri
        elif uri is None and folder is not None:
            names = [stem + suffix for stem in _stems(slide) for suffix in SUFFIXES]
            uri = files.join(folder, next((name for name in names if name in there), names[0]))
        if uri is None:
            lacking.append(slide.slide_id)
        uris.append(uri or slide.uri)
    if lacking:
        rows = f"{len(lacking)} slides, such as {lacking[0]!r}, name no file of features"
        remedy = "fill the column features, set cohort.features to their folder, or embed.encoder.name to make them"
        raise CohortError(cohort.uri, [f"{rows}; {remedy}"])
    if any(uri.endswith(".h5") for uri in uris):
        load_h5py()
    if not isinstance(slides, Columnar):
        return [replace(slide, uri=uri, mask=None, series=None) for slide, uri in zip(slides, uris, strict=True)]
    columns: dict[str, list[str | None]] = {"uri": [*uris], "mask": [None] * len(uris), "series": [None] * len(uris)}
    for name, values in columns.items():
        slides = slides.with_column(name, values)
    return slides


def _stems(slide: CohortSlide) -> list[str]:
    stem = slide.uri.rpartition("/")[2].rpartition(".")[0]
    stems = [file_stem(slide.slide_id, told_apart=True), file_stem(slide.slide_id), slide.slide_id, stem]
    return [one for one in dict.fromkeys(stems) if one and "/" not in one]
