"""`run` for notebooks: every stage that is not done, and what they left."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING

import pyarrow as pa
from pyarrow import csv

from pipeline.config.recipe import Config
from pipeline.datasets.opened import Store, open_store
from pipeline.errors import StageError
from pipeline.notebook.html import Page, table_html
from pipeline.storage.files import read_bytes

if TYPE_CHECKING:
    from pipeline.workflow.run import StageResult


@dataclass(frozen=True)
class Stage:
    """What one stage of a run came to."""

    name: str
    outcome: str
    """done, or skipped."""
    seconds: float
    metrics: Mapping[str, float]
    outputs: Mapping[str, str]
    """Name -> URI."""


@dataclass(frozen=True)
class Run:
    """What a run came to; tables and pages are read when they are asked for."""

    config: Config
    outcome: str
    """done, or nothing to do."""
    stages: Mapping[str, Stage]
    run_id: str | None
    """Of the MLflow run; None where no stage had to run."""
    model: str | None
    """For `predict`: the registered version, else the checkpoint's folder; None before training."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of the test, else of the last stage."""
        return self.stages["evaluate" if "evaluate" in self.stages else list(self.stages)[-1]].metrics

    @property
    def store(self) -> Store:
        """The patches."""
        return open_store(self._output("tile", "store"))

    @cached_property
    def slides(self) -> pa.Table:
        """What became of every slide of the cohort."""
        return self._table("tile", "ledger")

    @cached_property
    def predictions(self) -> pa.Table:
        """Of the slides of the test, one row each."""
        return self._table("evaluate", "predictions")

    @property
    def quality(self) -> Page:
        """The page of what was tiled."""
        return self._page("tile", "quality")

    @property
    def report(self) -> Page:
        """The page of the test."""
        return self._page("evaluate", "report")

    def _output(self, stage: str, name: str) -> str:
        if stage not in self.stages or name not in self.stages[stage].outputs:
            raise StageError(f'{self.config.name}: this run has no {name}: its last stage is {[*self.stages][-1]}, '
                             f'and {stage} makes it; run(config, "{stage}")')  # fmt: skip
        return self.stages[stage].outputs[name]

    def _table(self, stage: str, name: str) -> pa.Table:
        return csv.read_csv(io.BytesIO(read_bytes(self._output(stage, name))))

    def _page(self, stage: str, name: str) -> Page:
        uri = self._output(stage, name)
        return Page(uri, read_bytes(uri).decode())

    def _repr_html_(self) -> str:
        rows = [
            (stage.name, stage.outcome, stage.seconds, ", ".join(f"{k} {v:.4g}" for k, v in stage.metrics.items()))
            for stage in self.stages.values()
        ]
        model = f"<p>model: {escape(self.model)}</p>" if self.model else ""
        head = f"<p>{escape(self.config.name)}: {escape(self.outcome)}</p>"
        return f"<div>{head}{table_html(('stage', 'outcome', 'seconds', 'result'), rows)}{model}</div>"


def run(config: Config, last: str = "register") -> Run:
    """Bring every stage up to and including `last` up to date; those that are done cost nothing.

    Args:
        config: as `load_config` gives it.
        last: tile, embed, train, evaluate or register.

    Raises:
        PipelineError: one of `pipeline.errors`; its message says what to do. What was done stays.
    """
    from pipeline.workflow.run import run as run_stages

    result = run_stages(config, last)
    stages = {name: _stage(name, done) for name, done in result.stages.items()}
    return Run(config, result.outcome, stages, result.parent_run_id, _model(result.stages))


def _stage(name: str, done: StageResult) -> Stage:
    return Stage(name, done.outcome, done.record.seconds, done.record.metrics, done.record.outputs)


def _model(stages: Mapping[str, StageResult]) -> str | None:
    if "register" in stages:
        facts = stages["register"].record.facts
        return f"models:/{facts['model']}/{facts['version']}"
    return stages["train"].record.outputs["checkpoint"] if "train" in stages else None
