"""Hyperparameters: trainings of a recipe under other settings, of which the best by validation alone is tested.

Each trial is an ordinary run of the recipe up to its training, so what is done is not done again, and all share the
tiling. Nothing of the test split is looked at before one is chosen, and of the others nothing ever.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from pipeline.cluster import connected
from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.config.unused import unused
from pipeline.errors import ConfigError, StageError
from pipeline.results.tables import table_csv
from pipeline.storage.files import join, write_bytes, write_json
from pipeline.workflow.run import ensure_cohort
from pipeline.workflow.run import run as run_workflow
from pipeline.workflow.side_by_side import Asked, run_all
from pipeline.workflow.stage import Record

log = logging.getLogger(__name__)

SCORE = "val_score"
"""Metric of a training that trials are compared by: the mean over tasks of the first measure, of validation slides."""


@dataclass(frozen=True)
class Trial:
    """One training."""

    settings: Mapping[str, Any]
    """Dotted path -> value, where it differs from the recipe."""
    fingerprint: str
    checkpoint: str
    score: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class SearchResult:
    """All trainings, and the test of the chosen one."""

    trials: tuple[Trial, ...]
    chosen: int
    """Place among the trials."""
    test: Mapping[str, float]
    """Metrics of the chosen one alone."""
    outputs: Mapping[str, str]
    """Name -> URI."""


def trial_configs(config: Config) -> list[tuple[Mapping[str, Any], Config]]:
    """The settings of each trial and the recipe with them.

    Raises:
        ConfigError: no trials, two that are one, or settings that a recipe cannot have; all problems at once.
    """
    sweep = config.sweep
    if sweep is None or sweep.train is None:
        raise ConfigError("config", ["sweep.train: is required; give it grid or runs"])
    trials: list[tuple[Mapping[str, Any], Config]] = []
    problems: list[str] = []
    recipes: dict[str, Mapping[str, Any]] = {}
    for settings in _asked(sweep.train.grid, sweep.train.runs):
        try:
            changed = _changed(config, settings)
        except ConfigError as error:
            problems += [f"sweep.train, {json.dumps(dict(settings))}: {problem}" for problem in error.problems]
            continue
        recipe = fingerprint(changed.recipe())
        if recipe in recipes:
            other = json.dumps(dict(recipes[recipe]))
            problems.append(f"sweep.train: {json.dumps(dict(settings))} and {other} are one training; remove one")
        recipes[recipe] = settings
        trials.append((settings, changed))
    if problems:
        raise ConfigError("config", problems)
    return trials


def _asked(grid: Mapping[str, Sequence[Any]], runs: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    if grid:
        for values in product(*grid.values()):
            yield dict(zip(grid, values, strict=True))
    yield from runs


def _changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """The recipe with other settings; ConfigError with all that is wrong with them."""
    tree = config.model_dump(mode="json", exclude={"sweep"})
    for path, value in settings.items():
        *sections, name = path.split(".")
        place: Any = tree
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else place
        if not isinstance(place, dict):
            raise ConfigError("config", [f"{path}: {'.'.join(sections)} is no section"])
        place[name] = value
    try:
        found = Config.model_validate(tree)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ConfigError("config", lines) from error
    before = unused(config.model_dump(mode="json", exclude={"sweep"}))  # places that composing fills in
    if problems := [problem for problem in unused(tree) if problem not in before]:
        raise ConfigError("config", problems)
    return found


def run_search(config: Config) -> SearchResult:
    """Train all trials that are not done, several at once where they fit, choose by validation, and test that one.

    Raises:
        ConfigError: as `trial_configs`.
        StageError: a training has no validation score.
        PipelineError: what a training raises; the others go on at the next call.
    """
    asked = trial_configs(config)
    ensure_cohort(config)
    runs = [Asked(json.dumps(dict(settings)), own) for settings, own in asked]
    with connected(config.cluster):
        first = asked[0][1]
        run_workflow(first, "embed" if first.model.encoder.name == "features" else "tile")
        records = [found["train"] for found in run_all(runs, "train", "search")]
        trials = [_trial(settings, record) for (settings, _), record in zip(asked, records, strict=True)]
        chosen = max(range(len(trials)), key=lambda place: (trials[place].score, -place))
        best = trials[chosen]
        log.info("search: %s is chosen, %s %.4f", json.dumps(dict(best.settings)), SCORE, best.score)
        tested = run_workflow(asked[chosen][1], "evaluate").stages["evaluate"].record
    return _kept(config, trials, chosen, tested.metrics)


def _trial(settings: Mapping[str, Any], record: Record) -> Trial:
    if SCORE not in record.metrics:
        raise StageError(
            f"search: the training with {json.dumps(dict(settings))} has no validation score, by which one could be "
            "chosen; give the val split slides with labels of every task"
        )
    return Trial(settings, record.fingerprint, record.outputs["checkpoint"], record.metrics[SCORE], record.metrics)


def _kept(config: Config, trials: Sequence[Trial], chosen: int, test: Mapping[str, float]) -> SearchResult:
    name = f"{config.name}-{fingerprint([trial.fingerprint for trial in trials])}"
    folder = join(config.storage.root, "searches", name)
    outputs = {name: join(folder, name) for name in ("trials.csv", "search.json")}
    settings = dict.fromkeys(path for trial in trials for path in trial.settings)
    columns: dict[str, list[Any]] = {path: [_text(trial.settings.get(path)) for trial in trials] for path in settings}
    columns |= {"training": [trial.fingerprint for trial in trials], SCORE: [trial.score for trial in trials]}
    columns["chosen"] = [place == chosen for place in range(len(trials))]
    write_bytes(outputs["trials.csv"], table_csv(pa.table(columns)))
    told = {"trials": [asdict(trial) for trial in trials], "chosen": chosen, "test": dict(test)}
    write_json(outputs["search.json"], told)
    return SearchResult(tuple(trials), chosen, test, outputs)


def _text(value: object) -> str | None:
    return None if value is None else json.dumps(value)
