"""The section that says what is compared: models x cohorts x settings, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Name, Positive, Section, Seed

LAST = "last"
"""In place of a model's URI: what this recipe's own last training gave."""


class SweepCohort(Section):
    """Slides that all models are tested on."""

    uri: str
    """CSV or Parquet, as `cohort.uri`, with the columns of the models' tasks."""
    split: Literal["train", "val", "test"] | None = None
    """Which of its slides. null: all."""


class SettingsGrid(Section):
    """Settings of prediction, each in turn with each of the others. null: as the model was trained."""

    mode: Annotated[tuple[Literal["exact", "window", "random", "every"], ...], Field(min_length=1)] | None = None
    """As `model.select.mode`."""
    memory: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    """M, as `model.select.memory`."""
    precision: Annotated[tuple[Literal["float32", "bfloat16"], ...], Field(min_length=1)] | None = None
    """Of the encoder in the selection; the selected patches are encoded in float32 whatever this is."""
    mpp: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] | None = None
    """Microns per px of a patch, as `tiling.mpp`; for models that were not trained on level 0 as it is."""
    seed: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None
    """Of the patches that mode random draws."""

    @model_validator(mode="after")
    def _once(self) -> SettingsGrid:
        for name, values in self:
            if values is not None and len(set(values)) != len(values):
                raise ValueError(f"{name}: {list(values)} asks for one cell twice; remove what stands there again")
        return self


class SearchConfig(Section):
    """Trainings under other settings, by dotted path, as train.lr; of model, train and seed alone: all share the
    tiling.
    """

    grid: Mapping[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """Path -> its values; each in turn with each of the others."""
    runs: tuple[Mapping[str, Any], ...] = ()
    """Further trainings: path -> value."""

    @model_validator(mode="after")
    def _paths(self) -> SearchConfig:
        if not self.grid and not self.runs:
            raise ValueError("names no training; give it grid or runs")
        paths = dict.fromkeys([*self.grid, *(path for run in self.runs for path in run)])
        if odd := [path for path in paths if path != "seed" and path.partition(".")[0] not in ("model", "train")]:
            raise ValueError(f"{', '.join(odd)}: only settings of model and train, and seed, can be searched")
        return self


class SweepConfig(Section):
    """An evaluation sweep, or a search of hyperparameters."""

    models: Mapping[Name, str] = {}
    """What reports call a model -> models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint's folder by path or URI, or
    `last`: what this recipe's own last training gave. An alias is looked up once, at the start."""
    cohorts: Mapping[Name, SweepCohort] = {}
    """What reports call a cohort -> its slides."""
    grid: SettingsGrid = SettingsGrid()
    train: SearchConfig | None = None
    """What `pipeline sweep train` trains: the best by validation is tested."""
    resamples: Annotated[int, Field(ge=200)] = 2000
    """Of patients, behind intervals and p values; the same for all cells of a cohort."""
    few: Annotated[int, Field(ge=2)] = 10
    """Patients below which a group (a site, a scanner) is too small to judge."""
    allow_seen: bool = False
    """Test models on slides or patients that they were trained on, and mark it in every table. false: that is
    refused."""
    overlays: Annotated[int, Field(ge=0)] = 8
    """Slides that most models get wrong, of each cohort, whose heatmaps are drawn."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that score (execution). 0: this one, without Ray. null: as `cluster.workers`, at most its upper end."""
    shard_above: Annotated[int, Field(ge=1)] | None = None
    """Slides of more patches, where the patch store has them, are scored by all these processes at once, and joined by
    one: the same to the last bit (execution; exact selection of pixels alone). null: each slide by one."""
    models_gib: Annotated[float, Field(gt=0)] = 4.0
    """GiB of weights that one process holds at a time (execution): more models than that take several passes, each of
    which reads the slides."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        """A cohort that is only a place is all of its slides."""
        if not isinstance(data, dict) or not isinstance(data.get("cohorts"), dict):
            return data
        cohorts = {name: {"uri": one} if isinstance(one, str) else one for name, one in data["cohorts"].items()}
        return {**data, "cohorts": cohorts}

    @model_validator(mode="after")
    def _effect(self) -> SweepConfig:
        if self.grid.seed is not None and "random" not in (self.grid.mode or ()):
            raise ValueError(
                "grid.seed has no effect except with grid.mode: random; add that mode, or remove the seeds"
            )
        return self

    def with_places(self, absolute: Callable[[str], str]) -> SweepConfig:
        """The same, with places that mean the same in every process."""
        own = {
            name: uri if uri == LAST or uri.startswith("models:/") else absolute(uri)
            for name, uri in self.models.items()
        }
        cohorts = {name: one.model_copy(update={"uri": absolute(one.uri)}) for name, one in self.cohorts.items()}
        return self.model_copy(update={"models": own, "cohorts": cohorts})
