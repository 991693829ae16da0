"""The cohorts of a sweep: which slides, in which version, with which labels; and which of them a model knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import cached_property

from pipeline.bags.images import source_versions
from pipeline.bags.sources import patch_store
from pipeline.cohort.labels import stratum
from pipeline.cohort.table import CohortSlide, read_cohort
from pipeline.config.base import fingerprint
from pipeline.config.data import TaskConfig
from pipeline.config.recipe import Config
from pipeline.errors import CohortError, ConfigError, SlideError
from pipeline.ingest.cohorts import located
from pipeline.ingest.versions import Looked, look_at
from pipeline.model.folder import Seen
from pipeline.storage.files import SourceVersion
from pipeline.sweep.models import SweepModel
from pipeline.tiling.guide import check_environment
from pipeline.workflow.run import split_as_asked

Contents = Mapping[str, Set[str]]
"""Digest of a source -> keys and content digests of its slide."""

_SHOWN = 5


@dataclass(frozen=True)
class SweptCohort:
    """n slides that all models are tested on."""

    name: str
    uri: str
    slides: tuple[CohortSlide, ...]
    sources: tuple[str, ...]
    """Of each slide, the digest of its place, its version and what is given beside."""
    contents: Mapping[str, str]
    """slide_id -> the slide's key or content, where a store knows it already."""

    @cached_property
    def digest(self) -> str:
        """Of the manifest: ids, patients, versions and labels."""
        rows = [
            [slide.slide_id, slide.patient_id, source, dict(slide.labels), dict(slide.extra)]
            for slide, source in zip(self.slides, self.sources, strict=True)
        ]
        return fingerprint(rows)

    @property
    def patients(self) -> list[str]:
        """Of each slide."""
        return [slide.patient_id for slide in self.slides]

    def strata(self, task: TaskConfig) -> list[int]:
        """Of each slide, what resamples are stratified by."""
        return [stratum(task, slide.labels[task.name]) for slide in self.slides]

    def known_to(self, seen: Seen, found: Contents) -> list[str]:
        """Slides that a model was shown, or whose patients it was; `found` is what scoring knows beyond stores."""
        return [
            slide.slide_id
            for slide, source in zip(self.slides, self.sources, strict=True)
            if Seen.patient(slide.patient_id) in seen.patients
            or self.contents.get(slide.slide_id) in seen.slides
            or not seen.slides.isdisjoint(found.get(source, ()))
        ]


def read_cohorts(config: Config, model: SweepModel) -> list[SweptCohort]:
    """The config's cohorts, with the labels of the model's tasks.

    Raises:
        CohortError: a file or its rows are wrong, or have no column or other classes than the tasks.
        ConfigError: two are one.
    """
    assert config.sweep is not None
    found = [_read(config, model, name) for name in config.sweep.cohorts]
    names: dict[str, str] = {}
    for cohort in found:
        if (other := names.setdefault(cohort.digest, cohort.name)) != cohort.name:
            raise ConfigError(
                "config",
                [f"sweep.cohorts: {other} and {cohort.name} are the same slides, whose cells would be asked twice"],
            )
    return found


def _read(config: Config, model: SweepModel, name: str) -> SweptCohort:
    assert config.sweep is not None
    asked, tasks = config.sweep.cohorts[name], model.config.tasks
    try:
        cohort = read_cohort(asked.uri, tasks)
    except CohortError as error:
        lines = [f"{line} (sweep.cohorts.{name}, for the tasks of the models)" for line in error.problems]
        raise CohortError(error.source, lines) from error
    if asked.split is not None:
        cohort = split_as_asked(config, cohort)
        slides = cohort.subset(asked.split)
    else:
        slides = tuple(cohort.slides)
    if model.config.given_features:
        slides = tuple(located(config.cohort.model_copy(update={"uri": asked.uri}), slides))
    if not slides:
        raise CohortError(cohort.uri, [f"sweep.cohorts.{name}: no slide in split {asked.split}"])
    check_environment(slides, model.config.tiling)
    generated = model.config.cohort.megapixel_mnist is not None
    looked = [SlideError("missing", "generated")] * len(slides) if generated else look_at(slides, model.config.tiling)
    sources = _sources(model.config, slides, looked)
    return SweptCohort(name, cohort.uri, slides, tuple(sources), _contents(config, slides, looked))


def _sources(config: Config, slides: Sequence[CohortSlide], looked: Sequence[Looked]) -> list[str]:
    """A version that cannot be read is none, which scoring then reports by slide."""
    images = config.cohort.megapixel_mnist
    made = None if images is None else source_versions(images)
    return [
        fingerprint(
            [s.uri, s.mpp, s.mask, s.coords, s.series, made or (asdict(v) if isinstance(v, SourceVersion) else None)]
        )
        for s, v in zip(slides, looked, strict=True)
    ]


def _contents(config: Config, slides: Sequence[CohortSlide], looked: Sequence[Looked]) -> dict[str, str]:
    """Keys of the slides that this recipe has tiled."""
    if config.cohort.megapixel_mnist is not None:
        return {}
    versions = [version if isinstance(version, SourceVersion) else None for version in looked]
    statuses = patch_store(config).statuses(slides, versions)
    found = zip(slides, statuses, strict=True)
    return {slide.slide_id: one.key for slide, one in found if one is not None and one.key is not None}


def check_unseen(cohort: SweptCohort, models: Sequence[SweepModel], found: Contents) -> None:
    """Refuse, by ConfigError, models that know slides of the cohort; arguments as of `known_to`."""
    problems = []
    for model in models:
        if model.seen is None:
            continue
        if known := cohort.known_to(model.seen, found):
            shown = ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")
            problems.append(
                f"sweep.cohorts.{cohort.name}: {model.name} was trained or validated on {len(known)} of its "
                f"{len(cohort.slides)} slides, or on their patients: {shown}; take them out, name a split that it was "
                "not trained on, or set sweep.allow_seen=true, which marks the results"
            )
    if problems:
        raise ConfigError("config", problems)
