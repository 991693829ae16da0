"""The commands of evaluation sweeps."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Any

import typer
from typer.core import TyperGroup

from pipeline.cli.console import Chosen, print_json, print_table, with_config
from pipeline.errors import DataBudgetError

log = logging.getLogger(__name__)


class _Commands(TyperGroup):
    """`sweep` alone is `sweep run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` first where no command stands there."""
        named = args[:1] and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if named else ["run", *args])


app = typer.Typer(cls=_Commands, help="Compare models x cohorts x settings, each slide read once for all.")


@app.command("run")
@with_config
def run_sweep(chosen: Chosen) -> None:
    """Compare models on cohorts: score what is missing, each slide read once for all, and write the report.

    Exit 3 where a model cannot be had; the others are compared.
    """
    from pipeline.sweep.run import run

    result = run(chosen.load())
    if chosen.as_json:
        print_json(asdict(result))
    else:
        print(result.report)
        if result.outcome == "nothing to do":
            print("Nothing to do: every cell is there and the report stands.")
    if result.failed:
        log.error("sweep: %d models cannot be had: %s", len(result.failed), ", ".join(result.failed))
        raise typer.Exit(DataBudgetError.exit_code)


@app.command("folds")
@with_config
def folds_sweep(chosen: Chosen) -> None:
    """Cross-validate the recipe (`train.folds`): train and test every fold, and report over all patients."""
    from pipeline.sweep.folds import run_folds

    result = run_folds(chosen.load())
    if chosen.as_json:
        print_json(asdict(result))
        return
    rows = [
        (task, name, f"{found.value:.3f}", f"{found.low:.3f} to {found.high:.3f}")
        for task, each in result.measures.items()
        for name, found in each.items()
    ]
    print_table(("task", "measure", "over all patients", "95% interval"), rows)
    print(result.outputs["folds.json"])
    print(f"The folds' mean is {result.ensemble}")


@app.command("train")
@with_config
def train_sweep(chosen: Chosen) -> None:
    """Train the recipe under other settings (`sweep.train`), choose by validation, and test the chosen one alone."""
    from pipeline.sweep.search import SCORE, run_search

    result = run_search(chosen.load())
    if chosen.as_json:
        print_json(asdict(result))
        return
    rows = [
        (json.dumps(dict(trial.settings)), f"{trial.score:.4f}", "chosen" if place == result.chosen else "")
        for place, trial in enumerate(result.trials)
    ]
    print_table(("settings", SCORE, ""), rows)
    print(", ".join(f"{name} {value:.4g}" for name, value in result.test.items()))
    print(result.outputs["search.json"])


@app.command("plan")
@with_config
def plan_sweep(chosen: Chosen) -> None:
    """Say which cells `sweep` would score, in which passes over the slides; change nothing."""
    from pipeline.sweep.run import plan as make_plan

    planned = make_plan(chosen.load())
    if chosen.as_json:
        print_json(planned)
        return
    columns = ("model", "setting", "cohort", "state", "to_score", "slides", "cell")
    print_table(columns, [[str(row[name]) for name in columns] for row in planned["cells"]])
    rows = [
        (str(number), str(one["slides"]), ", ".join(one["models"]), str(len(one["scorings"])), f"{one['models_gib']:g}")
        for number, one in enumerate(planned["passes"], start=1)
    ]
    if rows:
        print_table(("pass", "slides to decode", "models", "scorings", "GiB of models"), rows)
    for text in planned["left_out"]:
        print(f"left out: {text}")
    for name, reason in planned["failed"].items():
        print(f"{name} cannot be had: {reason}")
