"""What all commands share: their common options, JSON on stdout, logs on stderr, errors as messages and exit codes."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Concatenate

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.credentials import masked, refusal
from pipeline.errors import ConfigError, Interrupted, PipelineError
from pipeline.logs import VARIABLE, Format, JsonLines, chosen_format
from pipeline.progress import CONSOLE, on_terminal

log = logging.getLogger(__name__)

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="Which file of conf/ to start from, without .yaml: demo, default, ...")
]
DirOption = Annotated[Path | None, typer.Option("--config-dir", help="Folder of configs to use instead of conf/.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
LogOption = Annotated[
    Format | None, typer.Option("--log-format", help=f"Of the lines on stderr; without it ${VARIABLE}, else text.")
]
_CHANGES = "Changes to the config: train.epochs=5 sets a field, model=resnet18 takes conf/model/resnet18.yaml."
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=_CHANGES)]


class Program(TyperGroup):
    """The commands; none of them sees an argument that holds a credential, which its messages might repeat."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse credentials, then go on as ever."""
        with errors(as_json="--json" in args):
            problems = [f"{_place(n, text)}: {why}" for n, text in enumerate(args, start=1) if (why := refusal(text))]
            if problems:
                raise ConfigError("command line", problems)
        return super().parse_args(ctx, args)


def _place(number: int, argument: str) -> str:
    """Which argument, without its value."""
    key, equals, _ = argument.partition("=")
    return key if equals and re.fullmatch(r"[\w.-]+", key) else f"argument {number}"


@dataclass(frozen=True)
class Chosen:
    """What the options of a command that takes a config say."""

    name: str
    overrides: Sequence[str]
    folder: Path | None
    as_json: bool
    log_format: Format | None = None

    def load(self) -> Config:
        """The validated config; raises ConfigError with all problems at once."""
        return load_config(self.name, self.overrides, self.folder)


def _chosen(
    config: ConfigOption = "default",
    overrides: Overrides = None,
    config_dir: DirOption = None,
    as_json: JsonOption = False,
    log_format: LogOption = None,
) -> Chosen:
    return Chosen(config, overrides or (), config_dir, as_json, log_format)


def with_config(command: Callable[Concatenate[Chosen, ...], None]) -> Callable[..., None]:
    """A command whose first parameter becomes the options that choose a config, after its own; inside `errors`."""
    _, *own = signature(command, eval_str=True).parameters.values()
    common = signature(_chosen, eval_str=True).parameters

    @wraps(command)
    def wrapped(**given: Any) -> None:
        chosen = _chosen(**{name: given.pop(name) for name in common})
        with errors(as_json=chosen.as_json, log_format=chosen.log_format):
            command(chosen, **given)

    parameters = [*own, *common.values()]
    wrapped.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def print_json(value: object) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, sort_keys=True))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """A table on stdout. Text is shown as it is, brackets too, and folded: a path that is cut cannot be copied."""
    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    Console().print(table)


@contextmanager
def errors(*, as_json: bool, log_format: Format | None = None) -> Iterator[None]:
    """Logging to stderr, signals as Interrupted, and every PipelineError as a message and its exit code."""
    if log_format is not None:
        os.environ[VARIABLE] = log_format  # for the processes of a local Ray, too
    _log_to_stderr(chosen_format())
    received: list[int] = []

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        # Ray's waits let KeyboardInterrupt through, as a new one without arguments, and swallow every other error.
        received.append(signum)
        raise KeyboardInterrupt

    before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (PipelineError, KeyboardInterrupt) as caught:
        error = caught if isinstance(caught, PipelineError) else Interrupted(received[-1])
        if chosen_format() == "json":
            log.log(logging.ERROR, "%s", error)  # its trace is for nobody
        else:
            print(f"error: {error}", file=sys.stderr)
        if as_json:
            kind = type(error).__name__
            print_json({"outcome": "failed", "error": kind, "message": str(error), "exit_code": error.exit_code})
        raise typer.Exit(error.exit_code) from error
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _without_credentials(record: logging.LogRecord) -> bool:
    """Mask what a library says, as of an endpoint with a password; always True: the message is shown."""
    record.msg, record.args = masked(record.getMessage()), ()
    return True


def _log_to_stderr(log_format: Format) -> None:
    """Coloured for a person, one plain line an event for a file, one JSON object for a machine."""
    handler: logging.Handler = logging.StreamHandler()
    form = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    if log_format == "json":
        form = JsonLines()
    elif on_terminal():
        handler, form = RichHandler(console=CONSOLE, show_path=False), logging.Formatter("%(message)s")
    handler.setFormatter(form)
    handler.addFilter(_without_credentials)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("pipeline").setLevel(logging.INFO)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # read when mlflow is first imported
