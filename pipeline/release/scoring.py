"""Two models on one test: each as the registry has it, by the same code, with the tiling that each was trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import cluster
from pipeline.bags.embed import embed_slides
from pipeline.bags.sources import LabelledSource, feature_store, open_sources, patch_root
from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.config.recipe import Config
from pipeline.errors import PipelineError, StageError
from pipeline.gate.evidence import Predictions
from pipeline.inference.operating import thresholds
from pipeline.inference.prediction import load_model
from pipeline.ingest.features import index_cohort
from pipeline.ingest.graph import tile_cohort
from pipeline.model.folder import EMBED_WEIGHTS, TISSUE_NETWORK, read_config
from pipeline.release.trained import keep_weights
from pipeline.results.evaluate import Evaluation, evaluate
from pipeline.results.report import render_report
from pipeline.storage.scratch import scratch_folder
from pipeline.store.features import stored_slides
from pipeline.store.patches import PatchStore, SlideStatus
from pipeline.tracking.registry import RegisteredVersion, fetch
from pipeline.tracking.tracker import Store
from pipeline.training.headroom import forget_peak, peak_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """What one model says of the test."""

    version: RegisteredVersion
    config: Config
    evaluation: Evaluation
    memory_gib: float

    def predictions(self, seen: Sequence[str] | None) -> Predictions:
        """As the gate reads them; `seen`: test slides that the model has learned from."""
        values = {
            task.name: tuple(tuple(one.values[task.name].tolist()) for one in self.evaluation.found)
            for task in self.config.tasks
        }
        return Predictions(
            version=self.version.version,
            train=self.version.tags.get("train_fingerprint", ""),
            values=values,
            seconds=round(self.evaluation.seconds, 4),
            memory_gib=round(self.memory_gib, 4),
            seen=None if seen is None else tuple(seen),
        )

    def page(self, cohort: Cohort, origin: Mapping[str, str]) -> str:
        """The report of the model on the test."""
        return render_report(self.evaluation, self.config, cohort, {**origin, "model": self.version.uri})


def own_config(store: Store, version: str, config: Config) -> Config:
    """The config of a registered model, with this run's places and test.

    Raises:
        TrackingError: its files cannot be read.
        StageError: it is of another version of this software, predicts something else, or reads other files.
    """
    with scratch_folder() as scratch:
        _, folder = fetch(store, version, scratch)
        own = _with_own_networks(read_config(folder), folder, config.storage.root)
    mine, asked = own.model_dump(mode="json")["tasks"], config.model_dump(mode="json")["tasks"]
    for task in (*mine, *asked):
        del task["class_weights"]  # of the loss alone
    if mine != asked:
        raise StageError(
            f"it predicts {[task['name'] for task in mine]} as {mine}, and the config asks for {asked}; other tasks, "
            "classes, bins or scales cannot be compared"
        )
    if own.given_features != config.given_features:
        raise StageError(
            "one of it and the config takes features that other tools have made, and the other slides; the test's "
            "files cannot be read by both"
        )
    return _here(own, config)


def _with_own_networks(own: Config, folder: Path, root: str) -> Config:
    """Tissue is found and features are made by the networks that the model brings, wherever it was trained."""
    network = own.tiling.tissue_model
    if network is not None and (packed := folder / TISSUE_NETWORK).is_file():
        kept = network.model_copy(update={"uri": keep_weights(root, packed)})
        own = own.model_copy(update={"tiling": own.tiling.model_copy(update={"tissue_model": kept})})
    packed = folder / EMBED_WEIGHTS
    if own.embed is None or not packed.is_file():
        return own
    encoder = own.embed.encoder.model_copy(update={"weights": keep_weights(root, packed)})
    return own.model_copy(update={"embed": own.embed.model_copy(update={"encoder": encoder})})


def _here(own: Config, config: Config) -> Config:
    """With the places, the test and the source of patches of this run."""
    same = {name: getattr(config, name) for name in ("storage", "cohort", "evaluate", "tracking", "cluster", "seed")}
    train = own.train.model_copy(update={"source": config.train.source})
    tiling = own.tiling.model_copy(
        update={name: getattr(config.tiling, name) for name in ("cpus", "max_seconds", "max_slide_gib", "cache")}
    )
    return own.model_copy(update={**same, "train": train, "tiling": tiling, "tasks": config.tasks})


def test_sources(config: Config, slides: Sequence[CohortSlide], keys: Mapping[str, str]) -> Sequence[LabelledSource]:
    """The test slides as a model needs them: those that are stored so already, and the others tiled and embedded.

    Args:
        config: of the model, with this run's places.
        slides: of the test.
        keys: slide id -> content, as the run's own tiling has it.

    Raises:
        StageError: a slide cannot be tiled as the model needs it.
    """
    if config.cohort.megapixel_mnist is None:
        keys = _tiled(config, slides, keys)
        if config.model.encoder.name == "features" and not config.given_features:
            _embedded(config, list(keys.values()))
    return open_sources(config, slides, keys)


test_sources.__test__ = False  # type: ignore[attr-defined]


def _tiled(config: Config, slides: Sequence[CohortSlide], keys: Mapping[str, str]) -> dict[str, str]:
    root = patch_root(config)
    store = PatchStore(root, config.tiling.fingerprint())
    if not store.gone(keys[slide.slide_id] for slide in slides):
        return {slide.slide_id: keys[slide.slide_id] for slide in slides}
    log.info("release: tiling %d test slides as the champion was trained", len(slides))
    pixels = config.train.source == "store"
    if config.given_features:
        found: Sequence[SlideStatus] = index_cohort(slides, config.tiling, root, on_status=lambda _: None)
    else:
        found = tile_cohort(
            slides, config.tiling, root, cpus=config.tiling.cpus, on_status=lambda _: None, pixels=pixels
        )
    lost = [status for status in found if status.key is None]
    if lost:
        raise StageError(
            f"{len(lost)} test slides cannot be tiled as it needs them, such as {lost[0].slide_id}: {lost[0].reason}"
        )
    others = [status.slide_id for status in found if status.key != keys[status.slide_id]]
    if others:
        raise StageError(
            f"{len(others)} test slides have another content than when the test was frozen, and it needs them tiled "
            f"anew: {', '.join(others[:5])}; bring their files back, or raise retrain.refresh_test"
        )
    return {status.slide_id: str(status.key) for status in found}


def _embedded(config: Config, keys: Sequence[str]) -> None:
    store, settings = feature_store(config)
    slides = stored_slides(PatchStore(patch_root(config), config.tiling.fingerprint()), keys)
    cpus, gpus = config.cluster.cpus_per_worker, config.cluster.gpus_per_worker
    embed_slides(slides, settings, store, actors=(1, 1), cpus=cpus, gpus=gpus, on_done=lambda _: None)


def score(store: Store, version: RegisteredVersion, config: Config, slides: Sequence[LabelledSource]) -> Scored:
    """Predict the test with a registered model, as a Ray task.

    Args:
        store: of the registry.
        version: of the model.
        config: `own_config`.
        slides: `test_sources`.
    """
    evaluation, memory = cluster.call(
        _evaluate,
        (store, version.uri, config, tuple(slides)),
        cpus=config.cluster.cpus_per_worker,
        gpus=config.cluster.gpus_per_worker,
        timeout_s=config.cluster.start_timeout_s,
        advice=f"where memory is short, lower model.select.chunk={config.model.select.chunk} or train.score_batch",
    )
    return Scored(version, config, evaluation, memory)


def _evaluate(
    store: Store, model_uri: str, config: Config, slides: tuple[LabelledSource, ...]
) -> tuple[Evaluation, float]:
    forget_peak()
    with scratch_folder() as scratch:
        version, folder = fetch(store, model_uri, Path(scratch))
        model, _ = load_model(folder)
        evaluation = evaluate(model, config, slides, thresholds(version.tags))
    return evaluation, peak_bytes() / 2**30


@dataclass(frozen=True)
class Unscorable:
    """Why a champion cannot be scored any more."""

    why: str


def try_score(
    store: Store,
    version: RegisteredVersion,
    config: Config,
    slides: Sequence[CohortSlide],
    keys: Mapping[str, str],
) -> Scored | Unscorable:
    """As `score`, of a champion that may be too old to be read, or made for other slides."""
    try:
        own = own_config(store, version.uri, config)
        return score(store, version, own, test_sources(own, slides, keys))
    except PipelineError as error:
        return Unscorable(str(error))
