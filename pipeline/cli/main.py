"""The commands. Results go to stdout (one JSON object with --json), everything else to stderr."""

from __future__ import annotations

import gc
import logging
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from pipeline.cli import data, jobs, predict, release, sweep
from pipeline.cli import store as store_commands
from pipeline.cli import view as view_command
from pipeline.cli.console import Chosen, JsonOption, Program, errors, print_json, print_table, with_config
from pipeline.config.data import DemoConfig
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError, DataBudgetError
from pipeline.progress import progress

log = logging.getLogger(__name__)
app = typer.Typer(
    cls=Program,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Learn from images too large for any GPU: from slides in a bucket to a registered model that predicts.",
    epilog="\n\n".join(
        (
            "Try it on made slides: python -m pipeline run --config demo",
            "Your own: python -m pipeline run cohort.uri=cohort.csv name=mystudy, with columns slide_id, uri and label",
            "What can be set: conf/README.md, and pipeline/config/ for every field",
            "Exit codes: 0 done or nothing to do, 1 failure, 2 usage or config, 3 too many bad slides, a damaged store "
            "or slides without prediction, 4 a model held or rejected, 5 resources that can never be met, 6 expected "
            "slides did not come, 7 a job whose end nobody knows, 130 or 143 interrupted",
        )
    ),
)
_RELEASE = "Training again, and who is champion"
_STAGES, _TILED, _MODEL, _START = "The pipeline, stage by stage", "What is tiled", "A trained model", "To begin with"
_CLUSTER = "On a cluster"


def _print_version(asked: bool) -> None:  # noqa: FBT001
    if asked:
        print(version("ips-pipeline"))
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before a command."""


def main() -> None:
    """Entry point of `ips` and `python -m pipeline`."""
    from pipeline.columnar import choose_allocator
    from pipeline.jobs.record import recorded

    choose_allocator()
    gc.set_threshold(50_000)  # rows of large cohorts are made by the million and hold no cycles: a seventh of the time
    with recorded():
        app()


@app.command(rich_help_panel=_START)
def demo(
    folder: Annotated[Path, typer.Argument(help="Local folder for cohort.csv and the slides.")],
    slides: Annotated[int, typer.Option(help="How many slides to write.", min=12)] = DemoConfig().slides,
    seed: Annotated[int, typer.Option(help="Of what is drawn: same seed, same bytes.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write slides to try things on: synthetic tissue, half of it with lesions, and their cohort file."""
    with errors(as_json=as_json):
        from pipeline.demo.cohort import write_demo

        _must_be_local(folder)

        with progress("demo", slides, "slides") as done:
            cohort = write_demo(str(folder.resolve()), DemoConfig(slides=slides, seed=seed), done.to)
        print_json({"cohort": cohort, "slides": slides}) if as_json else print(cohort)


@app.command(rich_help_panel=_START)
@with_config
def doctor(
    chosen: Chosen,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Ask every node of the cluster instead of this machine.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time this machine on some of the cohort's slides, for plan --cost.")
    ] = False,
) -> None:
    """Check Python, torch, Ray, OpenSlide, MLflow, storage and devices, and say how to mend what is wrong."""
    from pipeline.cli.doctor import examine

    if cluster:
        jobs.examine_cluster(chosen)
        return
    if measure:
        jobs.measure_rates(chosen)
        return
    checks = examine(chosen.name, chosen.overrides, chosen.folder)
    if chosen.as_json:
        print_json({"healthy": all(c.ok for c in checks), "checks": [asdict(c) for c in checks]})
    else:
        rows = [(c.name, Text("ok") if c.ok else Text("bad", "red"), c.found, c.remedy) for c in checks]
        print_table(("check", "", "found", "remedy"), rows)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command(rich_help_panel=_STAGES)
@with_config
def run(chosen: Chosen) -> None:
    """Run every stage that is not done: tile, embed where model=features, train, evaluate, register."""
    _stages(chosen, last="register")


@app.command(rich_help_panel=_STAGES)
@with_config
def plan(
    chosen: Chosen,
    cost: Annotated[
        bool, typer.Option("--cost", help="Say what a run from nothing would take; doctor --measure comes first.")
    ] = False,
) -> None:
    """Say which stages `run` would run, and why; change nothing."""
    from pipeline.workflow.run import plan as make_plan

    if cost:
        jobs.print_cost(chosen)
        return
    planned = make_plan(chosen.load())
    if chosen.as_json:
        print_json({"stages": [asdict(item) for item in planned]})
        return
    rows = [(item.stage, item.action, item.why, item.fingerprint or "") for item in planned]
    print_table(("stage", "action", "why", "fingerprint"), rows)


@app.command(rich_help_panel=_STAGES)
@with_config
def tile(chosen: Chosen) -> None:
    """Cut the cohort's slides into patches; write a page of what became of every slide."""
    _stages(chosen, last="tile")


@app.command(rich_help_panel=_STAGES)
@with_config
def embed(chosen: Chosen) -> None:
    """Make features of every patch by a frozen network (`embed.encoder`), for model=features; tile first."""
    _stages(chosen, last="embed")


@app.command(rich_help_panel=_STAGES)
@with_config
def train(chosen: Chosen) -> None:
    """Train, after tiling what is not tiled; an interrupted training goes on from its last checkpoint."""
    _stages(chosen, last="train")


@app.command(rich_help_panel=_STAGES)
@with_config
def evaluate(chosen: Chosen) -> None:
    """Evaluate the trained model on the test split and write the report, after the stages before."""
    _stages(chosen, last="evaluate")


@app.command(rich_help_panel=_STAGES)
@with_config
def register(chosen: Chosen) -> None:
    """Register the evaluated model in MLflow as the champion, after the stages before."""
    _stages(chosen, last="register")


@app.command(rich_help_panel=_TILED)
def verify(
    store: Annotated[
        str,
        typer.Argument(
            help="Folder or s3:// prefix of the patch store: storage.patches, by default <storage.root>/patches."
        ),
    ],
    threads: Annotated[int, typer.Option(help="Files read at a time, of some 60 MB each.", min=1)] = 8,
    as_json: JsonOption = False,
) -> None:
    """Read every committed slide of a patch store and compare it with its digests; exit 3 where one is damaged."""
    with errors(as_json=as_json):
        from pipeline.store.verify import verify_store

        with progress("verify", 0, "files") as done:
            report = verify_store(store, threads, done.to)
        if as_json:
            print_json({"whole": not report.damage, **asdict(report)})
        else:
            kinds = ((Text("damage", "red"), report.damage), (Text("leftover"), report.leftovers))
            rows = [(kind, one.uri, one.what, one.remedy) for kind, findings in kinds for one in findings]
            if rows:
                print_table(("", "where", "found", "remedy"), rows)
            damage = f"{len(report.damage)} damaged" if report.damage else "all whole"
            print(f"{report.slides} slides, {report.patches} patches, {report.files} files, {report.bytes} B: {damage}")
        if report.damage:
            raise typer.Exit(DataBudgetError.exit_code)


def _stages(chosen: Chosen, *, last: str) -> None:
    from pipeline.workflow.run import run as run_workflow

    config = chosen.load()
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
    print_json(summary) if chosen.as_json else _print_summary(summary, config)


_INTERNAL = ("identity", "items", "keys", "finished", "learned")


def _shown(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what only the program needs."""
    facts = {key: value for key, value in record["facts"].items() if key not in _INTERNAL}
    return {**{key: value for key, value in record.items() if key != "stage"}, "facts": facts}


def _print_summary(summary: dict[str, Any], config: Config) -> None:
    rows = []
    for stage, done in summary["stages"].items():
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in done["metrics"].items())
        paths = "\n".join(done["outputs"].values())
        work = ", ".join(f"{kind} {seconds:.3g} s" for kind, seconds in done["facts"].get("work", {}).items())
        told = _told({name: value for name, value in done["facts"].items() if name != "work"})
        result = "\n".join(line for line in (numbers, work, paths) if line) or told
        rows.append((stage, done["outcome"], f"{done['seconds']:.0f}", result))
    print_table(("stage", "outcome", "seconds", "result"), rows)
    if summary["outcome"] == "nothing to do":
        print("Nothing to do: every stage is done and unchanged.")
    print(where_runs_are_shown(str(config.tracking.uri)))


def where_runs_are_shown(tracking_uri: str) -> str:
    """A server's own address; for a database, the command that shows it."""
    if tracking_uri.startswith(("http://", "https://")):
        return tracking_uri
    return f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)}"


def _told(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)


def _must_be_local(folder: Path) -> None:
    if folder.parts[:1] in (("s3:",), ("gs:",), ("az:",)):
        raise ConfigError(str(folder), ["this command writes local files only; name a local folder and copy it"])


app.command(rich_help_panel=_MODEL)(predict.predict)
app.command(rich_help_panel=_MODEL)(view_command.view)
app.add_typer(sweep.app, name="sweep", rich_help_panel=_MODEL)
for _command in (data.qc, data.export, data.gc, data.erase):
    app.command(rich_help_panel=_TILED)(_command)
store_commands.app.command()(data.rm)
app.add_typer(store_commands.app, name="store", rich_help_panel=_TILED)
for _command in (release.retrain, release.gate, release.promote):
    app.command(rich_help_panel=_RELEASE)(_command)
app.add_typer(release.release, name="release", rich_help_panel=_RELEASE)
app.command(rich_help_panel=_CLUSTER, context_settings=jobs.SUBMIT_SETTINGS)(jobs.submit)
app.command(rich_help_panel=_CLUSTER)(jobs.manifest)
