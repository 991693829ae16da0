"""The commands on a store of patches or features as such: look into it, mend its catalogue."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.console import JsonOption, errors, print_json, print_table
from pipeline.errors import DataBudgetError, StorageError
from pipeline.storage.files import write_bytes

if TYPE_CHECKING:
    from pipeline.store.repair import Repaired

app = typer.Typer(no_args_is_help=True, help="Look into a store, tidy it, mend its catalogue.")

StoreArgument = Annotated[
    str, typer.Argument(help="Folder or s3:// prefix: storage.patches or storage.features, or one spec's folder in it.")
]

SlideArgument = Annotated[str, typer.Argument(help="Its key or the beginning of it, or the name of its file.")]


@app.command("ls")
def list_slides(store: StoreArgument, as_json: JsonOption = False) -> None:
    """List the slides of a store: how many patches of how many px each has, and which files became them."""
    from pipeline.datasets.opened import open_store

    with errors(as_json=as_json):
        opened = open_store(store)
        rows = opened.slides.to_pylist()
        patches = sum(row["n_patches"] for row in rows)
        if as_json:
            print_json({"store": opened.uri, "kind": opened.kind, "patches": patches, "slides": rows})
            return
        shown = ("key", "n_patches", "patch_px", "mpp") if opened.kind == "patches" else ("key", "n_patches", "dim")
        cells = ([_cell(row[name]) for name in (*shown, "sources")] for row in rows)
        print_table((*shown, "sources"), cells)
        print(f"{len(rows)} slides, {patches} {opened.kind}: {opened.uri}")


@app.command()
def show(store: StoreArgument, slide: SlideArgument, as_json: JsonOption = False) -> None:
    """Show all that the commit of a slide says."""
    from pipeline.datasets.opened import open_store

    with errors(as_json=as_json):
        found = open_store(store)[slide]
        facts = {"sources": list(found.sources), "uri": found.uri, **found.facts()}
        if as_json:
            print_json(facts)
        else:
            plain = {name: value for name, value in facts.items() if name not in _LONG}
            print_table(("", found.key), [(name, _cell(value)) for name, value in plain.items()])


@app.command()
def sample(
    store: StoreArgument,
    slide: Annotated[str | None, typer.Argument(help="Of one slide alone: its key, or its file.")] = None,
    count: Annotated[int, typer.Option(help="Patches to draw.", min=1, max=64)] = 64,
    seed: Annotated[int, typer.Option(help="Same seed, same patches.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Local PNG to write.")] = Path("sample.png"),
    as_json: JsonOption = False,
) -> None:
    """Write a sheet of patches drawn at random, and say which they are."""
    from pipeline.datasets.opened import open_store

    with errors(as_json=as_json):
        opened = open_store(store)
        if opened.kind != "patches":
            raise StorageError(f"{opened.uri}: features are no pictures; name the store of patches")
        drawn = opened.sample(count, seed) if slide is None else opened[slide].sample(count, seed)
        sink = io.BytesIO()
        drawn.sheet().save(sink, "PNG")
        write_bytes(str(out), sink.getvalue())
        if as_json:
            print_json({"sheet": str(out), "patches": drawn.table().to_pylist()})
        else:
            print(out)


_LONG = ("evidence", "tools", "levels", "bad_tiles", "sharpness")
"""What a commit says at length; `--json` has it."""


def _cell(value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


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
