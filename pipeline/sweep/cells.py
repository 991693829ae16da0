"""Models x settings x cohorts, as cells that are named by what they are: equal digests, equal predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from pipeline.config.base import fingerprint
from pipeline.config.data import TilingConfig
from pipeline.config.model import ModelConfig
from pipeline.config.recipe import Config
from pipeline.config.sweep import SettingsGrid
from pipeline.errors import ConfigError
from pipeline.model.folder import with_network
from pipeline.sweep.cohorts import SweptCohort
from pipeline.sweep.models import SweepModel

_VERSION = 1  # of what a prediction is made of, beyond the settings


@dataclass(frozen=True)
class Setting:
    """How a model predicts."""

    mode: Literal["exact", "window", "random", "every"]
    memory: int | None
    """M; None where all patches are kept."""
    chunk: int | None
    """I, where it changes the result."""
    precision: str
    mpp: float | None
    """Microns per px of a patch; None: as it was trained."""
    seed: int | None
    """Of what is drawn; None where nothing is."""

    @property
    def text(self) -> str:
        """For people."""
        parts = [self.mode, *([] if self.memory is None else [f"M {self.memory}"])]
        parts += [] if self.mpp is None else [f"{self.mpp:g} \N{MICRO SIGN}m"]
        parts += [] if self.precision == "float32" else [self.precision]
        return ", ".join([*parts, *([] if self.seed is None else [f"seed {self.seed}"])])


@dataclass(frozen=True)
class Scoring:
    """A model under a setting: what gives a slide its row."""

    model: SweepModel
    setting: Setting
    config: Config
    """The model's, with the setting."""

    @property
    def digest(self) -> str:
        """Of all that decides its rows, but for the slide."""
        setting = {**asdict(self.setting), "tiling": self.config.tiling.fingerprint(), "version": _VERSION}
        return fingerprint({"model": self.model.digest, "setting": setting})

    def at(self, folder: Path) -> Scoring:
        """With the tissue network of the model's files in `folder`, for the process that has them at hand."""
        return replace(self, config=with_network(self.config, folder))

    @property
    def name(self) -> str:
        """In reports."""
        return f"{self.model.name} ({self.setting.text})"

    @property
    def pixels(self) -> str:
        """Names what it sees of a slide: scorings that share it share one reading."""
        images = self.config.cohort.megapixel_mnist
        return fingerprint(
            [self.config.tiling.fingerprint(), None if images is None else images.model_dump(mode="json")]
        )


@dataclass(frozen=True)
class Cell:
    """A scoring on a cohort."""

    scoring: Scoring
    cohort: SweptCohort

    @property
    def digest(self) -> str:
        """Of its rows and of what they are measured against."""
        return fingerprint([self.scoring.digest, self.cohort.digest])


@dataclass(frozen=True)
class Expansion:
    """All cells, and what has none."""

    cells: tuple[Cell, ...]
    left_out: tuple[str, ...]
    """Combinations that a model cannot take, and why."""


def expand(models: Sequence[SweepModel], cohorts: Sequence[SweptCohort], grid: SettingsGrid) -> Expansion:
    """Every model with every setting that it can take, on every cohort; in the order of the config.

    Settings that mean the same for a model, as two M where all patches are kept, are one.

    Raises:
        ConfigError: there is no cell.
    """
    scorings: dict[str, Scoring] = {}
    left_out: list[str] = []
    for model in models:
        for asked in _combinations(model, grid):
            try:
                found = _scoring(model, asked)
            except (ValidationError, ValueError) as error:
                reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
                left_out.append(f"{model.name} ({asked.text}): {reason.removeprefix('Value error, ')}")
            else:
                scorings.setdefault(found.digest, found)
    if not scorings:
        raise ConfigError("config", [f"sweep.grid: no model can take any of its settings: {'; '.join(left_out)}"])
    cells = tuple(Cell(scoring, cohort) for cohort in cohorts for scoring in scorings.values())
    return Expansion(cells, tuple(dict.fromkeys(left_out)))


def _combinations(model: SweepModel, grid: SettingsGrid) -> Iterator[Setting]:
    own = model.config.model.select
    for mode, memory, precision, mpp, seed in product(
        grid.mode or (own.mode,),
        grid.memory or (own.memory,),
        grid.precision or ("float32",),
        grid.mpp or (model.config.tiling.mpp,),
        grid.seed or (0,),
    ):
        yield Setting(
            mode=mode,
            memory=None if mode == "every" else memory,
            chunk=own.chunk if mode == "window" else None,
            precision="float32" if mode in ("random", "every") else precision,
            mpp=None if mpp == model.config.tiling.mpp else mpp,
            seed=seed if mode == "random" else None,
        )


def _scoring(model: SweepModel, setting: Setting) -> Scoring:
    """The model under the setting; ValueError says why it cannot take it."""
    config = model.config
    if setting.mpp is not None:
        if config.tiling.mpp is None:
            raise ValueError("it was trained on level 0 as it is, whatever its microns")
        if config.tiling.coords is not None:
            raise ValueError("its patches stand where tiling.coords says")
        if config.tiling.min_sharpness:
            limit = f"tiling.min_sharpness={config.tiling.min_sharpness:g}"
            raise ValueError(f"its {limit} was chosen at tiling.mpp={config.tiling.mpp:g} and holds at no other")
    select: dict[str, object] = {"mode": setting.mode, "learn_from": "best"}  # which goes with every mode
    if setting.memory is not None:
        select["memory"] = setting.memory
    dump = config.model.model_dump()
    changed = ModelConfig.model_validate({**dump, "select": {**dump["select"], **select}})
    tiling = config.tiling if setting.mpp is None else _zoomed(config.tiling, setting.mpp)
    return Scoring(model, setting, config.model_copy(update={"model": changed, "tiling": tiling}))


def _zoomed(tiling: TilingConfig, mpp: float) -> TilingConfig:
    """With patches of other microns per px, and their surroundings as many times coarser as they were."""
    around = tiling.context_mpp
    if around is not None:
        assert tiling.mpp is not None
        around *= mpp / tiling.mpp
    return tiling.model_copy(update={"mpp": mpp, "context_mpp": around})
