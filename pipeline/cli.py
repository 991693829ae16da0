"""The commands. Results go to stdout (one JSON object with --json), everything else to stderr."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from pipeline import cli_data
from pipeline.compose import load_config
from pipeline.config import Config
from pipeline.config_data import DemoConfig
from pipeline.console import ConfigOption, DirOption, JsonOption, Overrides, print_table
from pipeline.console import errors as _errors
from pipeline.console import print_json as _print_json
from pipeline.errors import ConfigError, DataBudgetError

log = logging.getLogger(__name__)
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Learn from images too large for any GPU: from slides in a bucket to a registered model that predicts.",
)


def main() -> None:
    """Entry point of `ips` and `python -m pipeline`."""
    app()


@app.command()
def run(
    config: ConfigOption = "default",
    overrides: Overrides = None,
    config_dir: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run every stage that is not done: tile, train, evaluate, register."""
    _stages(config, overrides, config_dir, last="register", as_json=as_json)


@app.command()
def tile(
    config: ConfigOption = "default",
    overrides: Overrides = None,
    config_dir: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cut the cohort's slides into a committed patch store."""
    _stages(config, overrides, config_dir, last="tile", as_json=as_json)


@app.command()
def train(
    config: ConfigOption = "default",
    overrides: Overrides = None,
    config_dir: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train, after tiling what is not tiled; an interrupted training goes on from its last checkpoint."""
    _stages(config, overrides, config_dir, last="train", as_json=as_json)


@app.command()
def evaluate(
    config: ConfigOption = "default",
    overrides: Overrides = None,
    config_dir: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate the trained model on the test split and write the report, after the stages before it."""
    _stages(config, overrides, config_dir, last="evaluate", as_json=as_json)


@app.command()
def register(
    config: ConfigOption = "default",
    overrides: Overrides = None,
    config_dir: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Register the evaluated model and make it the champion, after the stages before it."""
    _stages(config, overrides, config_dir, last="register", as_json=as_json)


@app.command()
def plan(
    config: ConfigOption = "default",
    overrides: Overrides = None,
    config_dir: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what `run` would do and why; change nothing."""
    with _errors(as_json=as_json):
        from pipeline.workflow import plan as make_plan

        planned = make_plan(load_config(config, overrides or (), config_dir))
        if as_json:
            _print_json({"stages": [asdict(item) for item in planned]})
            return
        rows = [(item.stage, item.action, item.why, item.fingerprint or "") for item in planned]
        print_table(("stage", "action", "why", "fingerprint"), rows)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to write cohort.csv and the slides.")],
    slides: Annotated[int, typer.Option(help="How many slides.", min=12)] = DemoConfig().slides,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write the synthetic cohort: slides with and without small lesions."""
    with _errors(as_json=as_json):
        from pipeline.demo import write_demo

        _must_be_local(folder)

        cohort = write_demo(str(folder.resolve()), DemoConfig(slides=slides, seed=seed), _progress("demo"))
        _print_json({"cohort": cohort, "slides": slides}) if as_json else print(cohort)


@app.command()
def predict(
    model: Annotated[str, typer.Option(help="models:/NAME@champion, models:/NAME/VERSION or a model folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables and heatmaps.")] = Path("predictions"),
    slides: Annotated[list[str] | None, typer.Argument(help="Slide URIs.")] = None,
    cohort: Annotated[str | None, typer.Option(help="Predict a cohort file instead of single slides.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow's URI. Default: MLFLOW_TRACKING_URI, else ./mlflow.db.")
    ] = None,
    mpp: Annotated[float | None, typer.Option(help="Level-0 microns per px of slides that state none.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict slides with a registered model: probabilities, attention of every patch, a heatmap each."""
    with _errors(as_json=as_json):
        from pipeline.predict import predict as make_predictions

        _must_be_local(out)

        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
        result = make_predictions(model, slides or [], cohort, out.resolve(), tracking_uri=uri, mpp=mpp)
        if as_json:
            _print_json(result)
        else:
            print(out.resolve() / "predictions.csv")


@app.command()
def verify(
    store: Annotated[str, typer.Argument(help="URI of the patch store, by default <storage.root>/patches.")],
    threads: Annotated[int, typer.Option(help="Files read at a time, of some 60 MB each.", min=1)] = 8,
    as_json: JsonOption = False,
) -> None:
    """Read every committed slide of a patch store and compare it with its digests; exit 3 where one is damaged."""
    with _errors(as_json=as_json):
        from pipeline.verify import verify_store

        report = verify_store(store, threads, _progress("verify"))
        if as_json:
            _print_json({"whole": not report.damage, **asdict(report)})
        else:
            kinds = ((Text("damage", "red"), report.damage), (Text("leftover"), report.leftovers))
            rows = [(kind, one.uri, one.what, one.remedy) for kind, findings in kinds for one in findings]
            if rows:
                print_table(("", "where", "found", "remedy"), rows)
            damage = f"{len(report.damage)} damaged" if report.damage else "all whole"
            print(f"{report.slides} slides, {report.patches} patches, {report.files} files, {report.bytes} B: {damage}")
        if report.damage:
            raise typer.Exit(DataBudgetError.exit_code)


@app.command()
def doctor(
    config: ConfigOption = "default",
    overrides: Overrides = None,
    config_dir: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check Python, torch, Ray, OpenSlide, MLflow, storage and devices, and say how to mend what is wrong."""
    with _errors(as_json=as_json):
        from pipeline.doctor import examine

        checks = examine(config, overrides or (), config_dir)
        if as_json:
            _print_json({"healthy": all(c.ok for c in checks), "checks": [asdict(c) for c in checks]})
        else:
            rows = [(c.name, Text("ok") if c.ok else Text("bad", "red"), c.found, c.remedy) for c in checks]
            print_table(("check", "", "found", "remedy"), rows)
        if not all(check.ok for check in checks):
            raise typer.Exit(1)


def _stages(name: str, overrides: Sequence[str] | None, config_dir: Path | None, *, last: str, as_json: bool) -> None:
    with _errors(as_json=as_json):
        from pipeline.workflow import run as run_workflow

        config = load_config(name, overrides or (), config_dir)
        result = run_workflow(config, last)
        summary = {
            "outcome": result.outcome,
            "stages": {
                stage: {"outcome": done.outcome, **_shown(asdict(done.record))} for stage, done in result.stages.items()
            },
            "run_id": result.parent_run_id,
            "root": config.storage.root,
            "tracking_uri": config.tracking.uri,
        }
        _print_json(summary) if as_json else _print_summary(summary, config)


def _shown(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what only the program needs."""
    facts = {key: value for key, value in record["facts"].items() if key not in ("identity", "keys", "finished")}
    return {**{key: value for key, value in record.items() if key != "stage"}, "facts": facts}


def _print_summary(summary: dict[str, Any], config: Config) -> None:
    rows = []
    for stage, done in summary["stages"].items():
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in done["metrics"].items())
        paths = "\n".join(done["outputs"].values())
        rows.append((stage, done["outcome"], f"{done['seconds']:.0f}", f"{numbers}\n{paths}".strip()))
    print_table(("stage", "outcome", "seconds", "result"), rows)
    if summary["outcome"] == "nothing to do":
        print("Nothing to do: every stage is done and unchanged.")
    print(f"mlflow ui --backend-store-uri {config.tracking.uri}")


def _must_be_local(folder: Path) -> None:
    if folder.parts[:1] == ("s3:",):
        raise ConfigError(str(folder), ["this command writes local files only; name a local folder and copy it"])


def _progress(what: str) -> Callable[[int, int], None]:
    """A callback that logs every tenth of the work."""

    def on_progress(done: int, total: int) -> None:
        if done == total or done % max(1, total // 10) == 0:
            log.info("%s: %d/%d", what, done, total)

    return on_progress


for _command in (cli_data.qc, cli_data.export):
    app.command()(_command)
