"""The commands on what is tiled: look at it, hand it to other tools."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.compose import load_config
from pipeline.console import ConfigOption, DirOption, JsonOption, Overrides, errors, print_json
from pipeline.interchange import Tool


def qc(
    config: ConfigOption = "default",
    overrides: Overrides = None,
    config_dir: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the quality page, table and outlines of the slides that are tiled; tile nothing."""
    with errors(as_json=as_json):
        from pipeline.quality import review

        outputs = review(load_config(config, overrides or (), config_dir))
        print_json({"outcome": "done", "outputs": outputs}) if as_json else print(outputs["quality"])


def export(
    out: Annotated[str, typer.Option(help="Folder or s3:// prefix for the files.")],
    tool: Annotated[Tool, typer.Option("--format", help="Whose files: trident or clam.")] = "trident",
    config: ConfigOption = "default",
    overrides: Overrides = None,
    config_dir: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the patches' coordinates as HDF5 files that TRIDENT or CLAM goes on with, one a slide."""
    with errors(as_json=as_json):
        from pipeline.export import export_coordinates

        loaded = load_config(config, overrides or (), config_dir)
        written = export_coordinates(loaded, tool, out)
        print_json({"outcome": "done", "slides": len(written), "files": written}) if as_json else print(out)
