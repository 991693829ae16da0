"""The commands on what is tiled: look at it, hand it to other tools."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.console import Chosen, print_json, with_config
from pipeline.tiling.interchange import Tool


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
    tool: Annotated[Tool, typer.Option("--format", help="Which tool the files are for.")] = "trident",
) -> None:
    """Write the patches' coordinates as HDF5 files for TRIDENT or CLAM, one a slide."""
    from pipeline.results.export import export_coordinates

    written = export_coordinates(chosen.load(), tool, out)
    if chosen.as_json:
        print_json({"outcome": "done", "slides": len(written), "files": written})
    else:
        print(out)
