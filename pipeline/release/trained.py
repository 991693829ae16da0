"""What a model learned from: for the test that must be none of it, and for what has changed since."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.config.base import fingerprint
from pipeline.config.model import TrainConfig
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError
from pipeline.model.build import build_model
from pipeline.model.folder import WEIGHTS
from pipeline.storage.files import exists, join, read_json, upload, write_json
from pipeline.storage.scratch import scratch_folder
from pipeline.tracking.registry import RegisteredVersion, fetch
from pipeline.tracking.tracker import Store
from pipeline.workflow.changes import slides_of


@dataclass(frozen=True)
class Trained:
    """Of one training; `<root>/release/trained/<fingerprint>.json`."""

    learned: Mapping[str, Sequence[str]]
    """`keys` and `patients` of all slides that its weights have seen, also of the model that it began with."""
    slides: Sequence[str]
    """Digests of the ids of those that it was trained on itself."""
    rows: Mapping[str, Sequence[str]] | None
    """The cohort of then (`arrivals.Row`); None where it was not recorded."""
    contents: Mapping[str, str] = field(default_factory=dict)
    """Of then (`arrivals.contents`)."""


def read_trained(root: str, train: str | None) -> Trained | None:
    """Of a training by its fingerprint; None where it is not known: of another root, or an older release."""
    uri, record = join(root, "release", "trained", f"{train}.json"), join(root, "stages", f"train-{train}.json")
    if train is None:
        return None
    if exists(uri):
        return Trained(**read_json(uri))
    facts: Mapping[str, Any] = read_json(record)["facts"] if exists(record) else {}
    if "learned" not in facts:
        return None
    return Trained(facts["learned"], slides_of(facts["items"], "train"), None)


def write_trained(root: str, train: str, trained: Trained) -> None:
    """Record it."""
    write_json(join(root, "release", "trained", f"{train}.json"), asdict(trained))


def together(first: Mapping[str, Sequence[str]], second: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """What a model has learned from that began with another one."""
    return {name: sorted({*first[name], *second[name]}) for name in ("keys", "patients")}


def keep_weights(root: str, file: Path) -> str:
    """Copy a file of weights below a root, under a name of its content; its URI."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    uri = join(root, "release", "weights", f"{digest}{file.suffix}")
    if not exists(uri):
        upload(file, uri)
    return uri


def warmed(config: Config, store: Store, champion: RegisteredVersion) -> Config:
    """The config with which training goes on from the champion's weights, by its own schedule.

    Raises:
        ConfigError: the champion is another network, or the schedule contradicts itself.
        TrackingError: the champion's files cannot be read.
    """
    with scratch_folder() as scratch:
        _, folder = fetch(store, champion.uri, scratch)
        uri = keep_weights(config.storage.root, folder / WEIGHTS)
    given = config.retrain
    schedule = {"epochs": given.epochs, "lr": given.lr, "warmup_epochs": given.warmup_epochs, "begins_with": uri}
    changed = {name: value for name, value in schedule.items() if value is not None}
    try:
        train = TrainConfig.model_validate({**config.train.model_dump(), **changed})
    except ValueError as error:
        raise ConfigError("config", [f"retrain: with its schedule, train is wrong: {error}"]) from error
    warm = config.model_copy(update={"train": train})
    build_model(warm)
    return warm


def replayed(trained: Trained | None, share: float, seed: int) -> Callable[[Cohort], Cohort]:
    """What takes a share of the slides that were learned from out of training; which ones, the seed and the id say."""
    old = set() if trained is None else set(trained.slides)

    def left_out(slide_id: str) -> bool:
        digest = hashlib.sha256(f"replay\0{seed}\0{slide_id}".encode()).digest()
        return fingerprint(slide_id) in old and int.from_bytes(digest[:8]) / 2**64 >= share

    def choose(cohort: Cohort) -> Cohort:
        def split_of(slide: CohortSlide) -> str | None:
            return None if slide.split == "train" and left_out(slide.slide_id) else slide.split

        return cohort.with_splits(split_of)

    return choose
