"""The commands on what is kept: look at it, hand it to other tools, tidy it, erase a patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.console import Chosen, print_json, print_table, with_config
from pipeline.errors import ConfigError
from pipeline.tiling.interchange import FeatureTool

if TYPE_CHECKING:
    from pipeline.workflow.leftovers import Leftover


@with_config
def qc(chosen: Chosen) -> None:
    """Write the quality page, table and tissue outlines of the slides that are tiled; tile nothing."""
    from pipeline.results.quality import review

    outputs = review(chosen.load())
    print_json({"outcome": "done", "outputs": outputs}) if chosen.as_json else print(outputs["quality"])


@with_config
def export(
    chosen: Chosen,
    out: Annotated[str, typer.Option(help="Folder or s3:// prefix for the files.")],
    tool: Annotated[FeatureTool, typer.Option("--format", help="Which tool the files are for.")] = "trident",
    features: Annotated[bool, typer.Option("--features", help="The stored features too, not only places.")] = False,
) -> None:
    """Write the patches' coordinates, or features, as HDF5 files for TRIDENT, CLAM or STAMP, one a slide."""
    from pipeline.results.export import export_coordinates, export_features

    if features:
        written = export_features(chosen.load(), tool, out)
    elif tool == "stamp":
        raise ConfigError("export", ["--format stamp: STAMP has no files of coordinates alone; add --features"])
    else:
        written = export_coordinates(chosen.load(), tool, out)
    if chosen.as_json:
        print_json({"outcome": "done", "slides": len(written), "files": written})
    else:
        print(out)


DeleteOption = Annotated[bool, typer.Option("--delete", help="Do it; without this it is only told.")]


DaysOption = Annotated[float, typer.Option(help="Leave what is younger: a run to come may go on with it.", min=0)]


@with_config
def gc(chosen: Chosen, days: DaysOption = 7.0, delete: DeleteOption = False) -> None:
    """List what no finished stage names below storage.root, and with --delete remove it. While no stage is at work."""
    from pipeline.workflow.leftovers import find_leftovers

    _tidy(find_leftovers(chosen.load(), days), delete=delete, as_json=chosen.as_json)


@with_config
def rm(chosen: Chosen, days: DaysOption = 7.0, delete: DeleteOption = False) -> None:
    """List the patches, plans and features that no run uses, with their bytes, and with --delete remove them.

    Of the stores below storage.root alone, as `gc` does with all that lies there. While no stage is at work.
    """
    from pipeline.workflow.leftovers import find_leftovers

    _tidy(find_leftovers(chosen.load(), days, stores_alone=True), delete=delete, as_json=chosen.as_json)


def _tidy(found: Sequence[Leftover], *, delete: bool, as_json: bool) -> None:
    from pipeline.workflow.leftovers import remove

    if delete:
        remove(found)
    if as_json:
        outcome = "nothing to do" if not found else "done" if delete else "dry run"
        print_json({"outcome": outcome, "bytes": sum(one.bytes for one in found), "leftovers": [*map(asdict, found)]})
        return
    rows = [
        (one.uri, one.why, f"{one.bytes / 1e6:.1f}", f"{datetime.fromtimestamp(one.modified, UTC):%Y-%m-%d}")
        for one in found
    ]
    print_table(("leftover", "why", "MB", "last written"), rows)
    total = f"{len(found)} leftovers, {sum(one.bytes for one in found) / 1e6:.1f} MB"
    print(f"{total}, removed" if delete else f"{total}; --delete removes them")


@with_config
def erase(
    chosen: Chosen,
    patient: Annotated[str, typer.Option(help="The cohort's patient_id.")],
    delete: DeleteOption = False,
) -> None:
    """List all that is kept of a patient, and with --delete erase it; what only people can erase is named."""
    from pipeline.workflow.erasure import erase as erase_traces
    from pipeline.workflow.erasure import find_patient

    traces = find_patient(chosen.load(), patient)
    if delete:
        erase_traces(traces)
    if chosen.as_json:
        facts = {"slides": sorted(traces.slides), "erased": [*traces.erasable, *traces.packs], "left": traces.left}
        print_json({"outcome": "done" if delete else "dry run", **facts})
        return
    print(f"{'erased' if delete else 'to be erased with --delete'}, of {len(traces.slides)} slides of {patient}:")
    print(*(f"  {uri}" for uri in traces.erasable), *(f"  the slides in {uri}" for uri in traces.packs), sep="\n")
    print("not erased:", *(f"  {what}" for what in traces.left), sep="\n")
