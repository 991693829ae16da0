"""The commands on a store of patches or features as such: mend its catalogue, take over an older release's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.console import JsonOption, errors, print_json
from pipeline.errors import DataBudgetError

if TYPE_CHECKING:
    from pipeline.store.repair import Repaired

app = typer.Typer(no_args_is_help=True, help="Mend the catalogue of a store, or take over one of an older release.")

StoreArgument = Annotated[
    str, typer.Argument(help="Folder or s3:// prefix: storage.patches or storage.features, or one spec's folder in it.")
]


@app.command()
def repair(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Make the catalogue say again what lies beside it; exit 3 where a file is left that people have to mend.

    While no stage is at work.
    """
    from pipeline.store.repair import repair_store

    _mend(lambda: repair_store(store), as_json=as_json)


@app.command()
def migrate(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Take over what an older release stored, in place: two requests a slide, no slide is read or tiled.

    While no stage is at work. Without it the next run reads each slide once, to find that it is there.
    """
    from pipeline.store.repair import migrate_store

    _mend(lambda: migrate_store(store), as_json=as_json)


def _mend(work: Callable[[], Repaired], *, as_json: bool) -> None:
    with errors(as_json=as_json):
        done = work()
        if as_json:
            print_json({"outcome": "failed" if done.refused else "done", **asdict(done)})
        else:
            print(*(f"deleted, it cannot be read: {uri}" for uri in done.deleted), *done.refused, sep="\n", end="")
            print(
                f"{done.specs} catalogues: {done.added} slides added or corrected, {done.removed} that are gone taken "
                f"out, {done.taken_over} records of sources taken over"
            )
        if done.refused:
            raise typer.Exit(DataBudgetError.exit_code)
