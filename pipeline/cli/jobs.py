"""The commands on a cluster: send a command there, write its manifests."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from pipeline.cli.console import Chosen, JsonOption, errors, print_json, print_table, with_config
from pipeline.config.compose import find_config_dir, load_config
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)

SUBMIT_SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""Of the command `submit`: what follows the inner command's name is that one's."""
_UsageError: Any = typer.BadParameter.__bases__[0]  # typer has a click of its own since 0.20, and names it nowhere
_SHOWN = 10  # of the largest files that travel
_Inner = Annotated[list[str], typer.Argument(metavar="COMMAND...", help="A command of this program, with its options.")]


def submit(
    context: typer.Context,
    command: _Inner,
    working_dir: Annotated[
        Path, typer.Option("--working-dir", help="Folder that travels with the job: code and conf/, never data.")
    ] = Path(),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would travel, and submit nothing.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="End when the job is accepted.")] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="On SIGTERM or Ctrl-C leave the job running; without, it is stopped.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a command as a Ray job, follow its log, and exit with its code; asked for again, follow the one that runs.

    7 where nobody knows how it ended.
    """
    with errors(as_json=as_json):
        from pipeline.jobs.client import connect
        from pipeline.jobs.submit import prepare
        from pipeline.jobs.submit import submit as send

        config = inner_config(context.find_root().command, command, working_dir)
        order = prepare(config, command, working_dir)
        if dry_run:
            _print_package(order.package, as_json=as_json)
            return
        _log_package(order.package, config.deploy.package_mb)
        client = connect(config.deploy.address)
        job, begun = send(client, order)
        log.info("submit: %s %s", "submitted as" if begun else "follows the running", job.submission_id)
        if no_wait:
            outcome = {"outcome": "submitted" if begun else "running", "submission_id": job.submission_id}
            print_json({**outcome, "record": job.record}) if as_json else print(job.submission_id)
            return
        _follow(client, job, config, detach=detach, as_json=as_json)


def _follow(client: Any, job: Any, config: Config, *, detach: bool, as_json: bool) -> None:
    from pipeline.jobs.client import AwayError
    from pipeline.jobs.follow import follow, stop

    stream = sys.stderr if as_json else sys.stdout

    def show(text: str) -> None:
        print(text, end="", file=stream, flush=True)

    try:
        ended = follow(client, job, show, 60 * config.deploy.patience_minutes)
    except KeyboardInterrupt:
        if detach:
            log.info("submit: %s goes on; the same command follows it", job.submission_id)
            raise
        log.info("submit: stopping %s", job.submission_id)
        try:
            stop(client, job)
        except AwayError as away:
            log.warning("submit: %s may go on (%s)", job.submission_id, away)
        raise
    if as_json:
        print_json({"outcome": "done" if ended.code == 0 else "failed", **asdict(ended), "exit_code": ended.code})
    elif ended.code:
        print(f"error: {ended.submission_id} ended with {ended.code} ({ended.state}): {ended.reason}", file=sys.stderr)
    if ended.code:
        raise typer.Exit(ended.code)


@with_config
def manifest(
    chosen: Chosen,
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND", help="cronjob, rayjob, raycronjob, kueue, raycluster, namespace, mlflow, s3 or compose."
        ),
    ],
) -> None:
    """Write the YAML of a deployment to stdout, from the same config that runs."""
    from pipeline.jobs.manifests import render

    config = load_config(chosen.name, chosen.overrides, chosen.folder, in_job=True)
    folder = [] if chosen.folder is None else ["--config-dir", str(chosen.folder)]
    text = render(kind, config, [*folder, "--config", chosen.name, *chosen.overrides])
    print_json({"kind": kind, "yaml": text}) if chosen.as_json else print(text, end="")


def examine_cluster(chosen: Chosen) -> None:
    """The table of `doctor --cluster`; exit 1 where a check of a node fails."""
    from pipeline.jobs.nodes import examine_nodes

    given = ["cohort.uri=cohort.csv"] if chosen.name == "default" else []  # the default config names no cohort
    config = load_config(chosen.name, [*given, *chosen.overrides], chosen.folder)
    found = examine_nodes(config)
    healthy = all(one.ok for one in found)
    if chosen.as_json:
        print_json({"healthy": healthy, "nodes": len({one.node for one in found}), "checks": [*map(asdict, found)]})
    else:
        rows = [
            (one.node, one.name, Text("ok") if one.ok else Text("bad", "red"), one.found, one.remedy) for one in found
        ]
        print_table(("node", "check", "", "found", "remedy"), rows)
    if not healthy:
        raise typer.Exit(1)


def measure_rates(chosen: Chosen) -> None:
    """`doctor --measure`: what was measured, and where it is kept."""
    from pipeline.jobs.rates import measure
    from pipeline.workflow.run import load_cohort

    config = chosen.load()
    rates = measure(config, load_cohort(config, needs_labels=True))
    if chosen.as_json:
        print_json(asdict(rates))
        return
    patches, cpu_s = (sum(getattr(slide, name) for slide in rates.slides) for name in ("patches", "cpu_s"))
    rows = [
        ("tile", f"{patches / cpu_s:.3g} patches a CPU second"),
        ("score", f"{1 / rates.score_s:.3g} patches a second and worker"),
        ("train", f"{1 / rates.train_s:.3g} patches a second and worker"),
    ]
    print_table(("on", rates.machine), rows)


def print_cost(chosen: Chosen) -> None:
    """`plan --cost`: a table, for each kind of machine that was measured."""
    from pipeline.jobs.cost import estimate
    from pipeline.jobs.rates import kept_rates
    from pipeline.workflow.run import load_cohort

    config = chosen.load()
    known = kept_rates(config)
    if not known:
        raise ConfigError(
            "plan --cost",
            [
                "nothing was measured for this tiling and network; run doctor --measure with the same config, once on "
                "each kind of machine, as by submit"
            ],
        )
    cohort = load_cohort(config, needs_labels=True)
    found = {rates.machine: estimate(config, cohort, rates) for rates in known}
    if chosen.as_json:
        print_json({"machines": {machine: [*map(asdict, rows)] for machine, rows in found.items()}})
        return
    for machine, estimates in found.items():
        rows = [
            (one.what, f"{one.low:,.3g} to {one.high:,.3g} {one.unit}", f"{one.likely:,.3g}", one.rests_on)
            for one in estimates
        ]
        print_table((machine, "range", "likely", "rests on"), rows)


def inner_config(program: Any, arguments: Sequence[str], folder: Path) -> Config:
    """The config of the command that is to be submitted, as its own options say; as inside the job.

    Raises:
        ConfigError: there is no such command, its arguments are wrong, or it takes no config, so has no root.
    """
    given = _parsed(program, arguments)
    if "config" not in given:
        raise ConfigError(f"submit {arguments[0]}", ["takes no config, so its job has no root; run it here instead"])
    config_dir, folder = given["config_dir"], folder.resolve()
    if config_dir is not None and not (folder / config_dir).resolve().is_relative_to(folder):
        raise ConfigError("--config-dir", [f"{config_dir} is not below the working directory, which alone travels"])
    found = find_config_dir(None if config_dir is None else folder / config_dir, folder)  # as the job will
    return load_config(given["config"], given["overrides"] or (), found, in_job=True)


def _parsed(program: Any, arguments: Sequence[str]) -> Mapping[str, Any]:
    """The parameters of an inner command, as it would see them itself; a subcommand's of a group."""
    command, rest, path = program, list(arguments), list[str]()
    while commands := getattr(command, "commands", None):
        name = rest.pop(0) if rest else ""
        if name not in commands or name == "submit":
            names = ", ".join(sorted(set(commands) - {"submit"}))
            raise ConfigError(f"submit {' '.join([*path, name])}".strip(), [f"no such command; one of {names}"])
        command, path = commands[name], [*path, name]
    try:
        parameters: Mapping[str, Any] = command.make_context(" ".join(path), rest).params
    except _UsageError as error:
        raise ConfigError(f"submit {' '.join(path)}", [error.format_message()]) from error
    return parameters


def _print_package(package: Any, *, as_json: bool) -> None:
    if as_json:
        print_json({"outcome": "dry run", "bytes": package.bytes, "files": package.files, "left": package.kept_back})
        return
    rows = [("travels", name, f"{size:,}") for name, size in package.files.items()]
    rows += [("stays", name, f"{size:,}") for name, size in package.kept_back.items()]
    print_table(("", "file", "bytes"), rows)
    print(f"{len(package.files)} files, {package.bytes / 1e6:.2f} MB would travel from {package.folder}")


def _log_package(package: Any, limit_mb: float) -> None:
    largest = ", ".join(f"{name} {size / 1e3:.0f} kB" for name, size in list(package.files.items())[:_SHOWN])
    log.info(
        "submit: %d files, %.2f of at most %g MB travel from %s; the largest: %s",
        *(len(package.files), package.bytes / 1e6, limit_mb, package.folder, largest),
    )
    if package.kept_back:
        log.info("submit: data and credentials stay here: %s", ", ".join(list(package.kept_back)[:_SHOWN]))
