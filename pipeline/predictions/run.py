"""A batch of slides to a folder: what is there is kept, the rest is predicted, here or on Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline.bags.images import source_versions
from pipeline.config.base import fingerprint
from pipeline.config.data import CohortConfig
from pipeline.config.recipe import ClusterConfig, Config
from pipeline.errors import SlideError, StageError, StorageError
from pipeline.inference.prediction import unpredicted
from pipeline.ingest import child
from pipeline.ingest.cohorts import located
from pipeline.ingest.versions import Looked, look_at
from pipeline.model.calibration import read_calibration
from pipeline.model.folder import MEMBERS, WEIGHTS, keep_any, model_folders, read_seen, shared_config, whole_digest
from pipeline.predictions.asked import Asked, as_text, asked_slides, check_bags
from pipeline.predictions.dicom import load_highdicom
from pipeline.predictions.finish import Finishing
from pipeline.predictions.maps import colours
from pipeline.predictions.output import (
    MODEL,
    THREADS,
    Failure,
    Outcome,
    begun_names,
    check_spread,
    folder_of,
    forget_models,
    read_facts,
    safe_name,
    with_intervals,
    write_tables,
)
from pipeline.predictions.patients import bags_of, share_outcomes, with_others
from pipeline.predictions.slide import Job, Predicting
from pipeline.predictions.summary import write_summary
from pipeline.progress import progress
from pipeline.storage.files import SourceVersion, absolute, exists, is_remote, join, local_path
from pipeline.storage.lease import held
from pipeline.storage.scratch import scratch_folder
from pipeline.store.rows import asked_digest
from pipeline.tiling.guide import check_environment

log = logging.getLogger(__name__)

_VERSION = 1
"""Of what a slide's folder holds: folders of another one are made again."""
SHARD_ABOVE = 16_384
"""Patches: minutes on a core, and to plan a slide once more takes seconds, but for `tiling.min_sharpness`, with which
it takes as long as to cut it (`large.cut`)."""
_KEPT = (
    "slide_id", "folder", "dimensions", "mpp", "values", "labels", "n_patches", "n_bad_tiles", "attention_in_selected",
    "histograms", "sentences", "selected", "model", "spread", "key", "content",
)  # fmt: skip

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class How:
    """What a batch may be told beside its slides."""

    store: str | None = None
    """Root of a patch store, whose patches are taken where it has them."""
    workers: int = 0
    """Actors on Ray; 0: this process alone, without Ray."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    heads: bool = False
    """Also the attention of each head."""
    all_patches: bool = False
    """Also every patch as GeoJSON."""
    dicom: bool = False
    """Also the maps of DICOM slides as DICOM Parametric Maps."""
    shard_above: int | None = SHARD_ABOVE
    """Slides of more patches are scored by all actors at once, and joined by one: the same to the last bit. None: each
    slide by one."""


def predict(
    model: str,
    slides: Sequence[str],
    cohort: str | None,
    out: str | Path,
    *,
    tracking_uri: str,
    mpp: float | None = None,
    series: int | None = None,
    how: How | None = None,
) -> dict[str, Any]:
    """Predict slides, folders or prefixes of slides, the slides of a cohort, or all of them.

    A slide that cannot be used has its reason in the tables; the others are predicted. Slides whose folders follow from
    the same model, file and options are not predicted again.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a folder with weights.safetensors and config.json; or an
            ensemble, by version, or as a folder with such folders below `members`.
        slides: see `asked.asked_slides`, as are `cohort`, `mpp` and `series`.
        cohort: URI of a cohort file.
        out: folder or s3:// prefix, made when absent; this room's README says what it will hold.
        tracking_uri: where the registry is.
        mpp: microns per level-0 px of `slides`.
        series: number of the image to take of each of `slides`.
        how: else as `How` says by itself.

    Returns:
        Plain data: the model, the places written, the number of slides, of those predicted now, and slide id -> reason
        of the failed ones.

    Raises:
        StageError: nothing to predict, no slide at all could be predicted (the tables are written), another process
            is at this folder, or an ensemble's models cannot be averaged.
        TrackingError: the model is not found or cannot be fetched.
        ConfigError: what `how.dicom` needs is not installed.
    """
    how = how or How()
    if how.dicom:
        load_highdicom()
    asked = asked_slides(slides, cohort, mpp=mpp, series=series)
    child.start()  # beside the model's loading
    place = _folder(out)
    with _found(model, tracking_uri) as (source, folder), held(join(place, "predict.lease"), "predict"):
        config = shared_config(folder)
        check_spread(config.tasks, len(model_folders(folder)))
        check_bags(asked, config, cohort)
        if config.given_features:
            asked = _in_their_files(asked)
        check_environment([one.slide for one in asked], config.tiling)
        _check_store(how.store, config)
        digest = whole_digest(folder)
        kept = join(place, MODEL, digest) if how.workers else str(folder)  # apart from what earlier batches kept
        if how.workers:  # whose processes may be elsewhere
            keep_any(folder, kept)
        above = how.shard_above if how.workers > 1 else None
        predicting = Predicting(
            kept, source, digest, place, how.store, how.heads, how.all_patches, how.dicom, above, max(1, how.workers)
        )
        return _predict(asked, predicting, config, how, folder)


def _in_their_files(asked: Sequence[Asked]) -> list[Asked]:
    """Slides that stand for their files of features; CohortError where one names none."""
    slides = located(CohortConfig(uri="predict"), [one.slide for one in asked])
    return [replace(one, slide=slide) for one, slide in zip(asked, slides, strict=True)]


def _predict(asked: Sequence[Asked], predicting: Predicting, config: Config, how: How, folder: Path) -> dict[str, Any]:
    """Of the model in `folder`."""
    cases, seen = read_calibration(folder, config.tasks), read_seen(folder)
    out, looked = predicting.out, _versions(config, asked)
    jobs = [_job(one, version, predicting, config) for one, version in zip(asked, looked, strict=True)]
    bags = bags_of([one.bag(config) for one in asked], config)
    jobs = with_others(jobs, bags)
    outcomes: list[Outcome | None] = [
        _failed(one, version) if isinstance(version, SlideError) else None
        for one, version in zip(asked, looked, strict=True)
    ]
    _add_done(outcomes, jobs, out)
    share_outcomes(outcomes, bags, [one.slide.slide_id for one in asked])
    missing = [bag for bag in bags if outcomes[bag[0]] is None]
    left = sum(map(len, missing))
    sizes = [0 if isinstance(version, SlideError) else version.size for version in looked]
    done = sum(found is not None and not isinstance(found, Failure) for found in outcomes)
    log.info("predict: %d slides, of which %d are done already and %d are to be predicted", len(jobs), done, left)
    if how.workers:
        missing.sort(key=lambda bag: (-sum(sizes[place] for place in bag), bag))  # none is left to the end alone
    with _working(how) as (work, work_in_parts), progress("predict", len(jobs), "slides", len(jobs) - left) as steps:
        for number, answer in work_in_parts(predicting.worker, [[jobs[place] for place in bag] for bag in missing]):
            bag = missing[number]
            each = [Failure("crash", str(answer))] * len(bag) if isinstance(answer, StageError) else answer
            for place, found in zip(bag, each, strict=True):
                outcomes[place] = found = _slim(found)
                _log(jobs[place], found)
            steps.advance(len(bag))
        complete = [found for found in outcomes if found is not None]
        good = [found for found in complete if not isinstance(found, Failure)]
        if good:
            scales = colours([found["histograms"] for found in good])
            finishing = Finishing(scales, [name for task in config.tasks for name in task.output_columns])
            for _, failed in work(finishing.worker, [join(out, found["folder"]) for found in good]):
                if isinstance(failed, StageError):
                    raise failed
    complete = with_intervals(complete, [one.slide.patient_id for one in asked], config.tasks, cases, seen)
    told = _report(asked, jobs, complete, predicting, config, left)
    forget_models(out, predicting.digest, folder)
    return told


def _report(
    asked: Sequence[Asked],
    jobs: Sequence[Job],
    outcomes: Sequence[Outcome],
    predicting: Predicting,
    config: Config,
    made: int,
) -> dict[str, Any]:
    """Write what is over all slides; what `predict` returns."""
    out, named = predicting.out, [(one.slide.slide_id, one.slide.uri) for one in asked]
    labels = [job.labels for job in jobs]
    patients = [one.patient for one in asked] if config.cohort.bag == "patient" else None
    places = write_tables(out, named, outcomes, labels, config.tasks, patients)
    whose = None if patients is None else [one.bag(config) for one in asked]
    places.append(write_summary(out, predicting.source, named, outcomes, labels, config.tasks, whose))
    failed = {slide_id: found.message for (slide_id, _), found in zip(named, outcomes, strict=True)
              if isinstance(found, Failure)}  # fmt: skip
    if len(failed) == len(named):
        reasons = "\n".join(f"  - {slide_id}: {reason}" for slide_id, reason in failed.items())
        raise StageError(f"predict: none of {len(named)} slides could be predicted:\n{reasons}")
    written = {place.rpartition("/")[2]: place for place in places} | {"slides": join(out, "slides")}
    return {
        "model": predicting.source, "slides": len(named), "predicted_now": made, "failed": failed, "written": written,
    }  # fmt: skip


def _check_store(store: str | None, config: Config) -> None:
    """Warn of one from which nothing can come."""
    if store is not None and not exists(join(store, config.tiling.fingerprint())):
        log.warning(
            "predict: --store %s holds no slides as this model takes them (tiling %s); all are read where they lie",
            store,
            config.tiling.fingerprint(),
        )


def _folder(out: str | Path) -> str:
    """The absolute place of a batch; StageError where it can be none."""
    place = absolute(str(out))
    if not is_remote(place):
        try:
            local_path(place).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StageError(f"predict: --out {out} is no folder ({error.strerror}); name one") from error
    return place


@contextmanager
def _found(model: str, tracking_uri: str) -> Iterator[tuple[str, Path]]:
    """The exact version (or folder), and its files for the block: what embeds is loaded when needed."""
    if (Path(model) / WEIGHTS).is_file() or (Path(model) / MEMBERS).is_dir():
        yield str(Path(model).absolute()), Path(model).absolute()
        return
    from pipeline.tracking.registry import fetch  # loads MLflow for seconds
    from pipeline.tracking.tracker import connect

    with scratch_folder() as scratch:
        version, folder = fetch(connect(tracking_uri), model, scratch)
        log.info("predict: %s is version %s", model, version.version)
        yield version.uri, folder


def _versions(config: Config, asked: Sequence[Asked]) -> list[Looked]:
    """Of each slide's files; generated images have one for all."""
    slides = [one.slide for one in asked]
    images = config.cohort.megapixel_mnist
    if images is not None:
        return [SourceVersion(0, fingerprint(source_versions(images)), None)] * len(slides)
    nowhere = [_nowhere(slide.uri) for slide in slides]
    looked = iter(look_at([slide for slide, lost in zip(slides, nowhere, strict=True) if lost is None], config.tiling))
    return [lost or next(looked) for lost in nowhere]


def _nowhere(uri: str) -> SlideError | None:
    """Why a URI means no place."""
    try:
        absolute(uri)
    except StorageError as error:
        return SlideError("missing", str(error))
    return None


def _job(one: Asked, version: Looked, predicting: Predicting, config: Config) -> Job:
    labels = {task.name: one.slide.extra.get(task.column) or None for task in config.tasks}
    known = asked_digest(one.slide, None if isinstance(version, SlideError) else version)
    follows = [_VERSION, one.slide.slide_id, known, predicting.digest, predicting.source, labels]
    extras = [predicting.heads, predicting.all_patches, *(["dicom"] if predicting.dicom else [])]
    identity = fingerprint([*follows, *extras])
    return Job(one.slide, one.mpp_remedy, labels, identity)


def _failed(one: Asked, error: SlideError) -> Failure:
    return Failure(error.reason, as_text(unpredicted(error, one.mpp_remedy)))


def _add_done(outcomes: list[Outcome | None], jobs: Sequence[Job], out: str) -> None:
    """Those slides whose folders stand."""
    begun = begun_names(out)
    places = [
        place
        for place, (found, job) in enumerate(zip(outcomes, jobs, strict=True))
        if found is None and safe_name(job.slide.slide_id) in begun
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        known = pool.map(lambda place: read_facts(folder_of(out, jobs[place].slide.slide_id)), places)
        for place, facts in zip(places, known, strict=True):
            if facts is not None and facts.get("identity") == jobs[place].identity:
                outcomes[place] = _slim(facts)


def _slim(found: Outcome) -> Outcome:
    """What the tables, the page and the colours take: of a hundred thousand slides, 200 MB."""
    return found if isinstance(found, Failure) else {name: found[name] for name in _KEPT if name in found}


def _log(job: Job, found: Outcome) -> None:
    if isinstance(found, Failure):
        log.warning("predict: %s: %s", job.slide.slide_id, found.message)


Work = Callable[[Callable[[], Callable[[Item], Found]], Sequence[Item]], Iterator[tuple[int, Found | StageError]]]


@contextmanager
def _working(how: How) -> Iterator[tuple[Work[Any, Any], Work[Any, Any]]]:
    """What makes something of each item, by its place: in this process, or by actors on Ray for the block.

    The second does so where an actor may cut an item into parts.
    """
    if not how.workers:
        yield _here, _here
        return
    from pipeline.cluster import connected  # Ray loads for a second
    from pipeline.results.parts import pooled_in_parts
    from pipeline.results.pool import Room, pooled

    cluster = how.cluster
    room = Room(how.workers, cluster.cpus_per_worker, cluster.gpus_per_worker, cluster.start_timeout_s)
    cutting = how.workers > 1 and how.shard_above is not None

    def work(pool: Any, make: Callable[[], Callable[[Item], Found]], items: Sequence[Item]) -> Any:
        return pool(make, items, room, "predict") if items else iter(())

    with connected(cluster):
        yield partial(work, pooled), partial(work, pooled_in_parts if cutting else pooled)


def _here(make: Callable[[], Callable[[Item], Found]], items: Sequence[Item]) -> Iterator[tuple[int, Found]]:
    if items:
        work = make()
        yield from ((place, work(item)) for place, item in enumerate(items))
