"""The command that shows slides in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.console import errors


def view(
    place: Annotated[
        str, typer.Argument(metavar="OUT_OR_STORE", help="Folder or s3:// prefix that predict wrote, or a patch store.")
    ],
    against: Annotated[
        str | None, typer.Option(help="Another folder of predict: its model is shown beside, and where the two differ.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Beyond this machine it asks for a token, which it prints.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: any free one.", min=0, max=65535)] = 8765,
) -> None:
    """Show slides at full resolution in a browser, with what a model saw; prints the address, ends with Ctrl-C."""
    with errors(as_json=False):
        from pipeline.view.run import view as serve

        serve(place, against, host=host, port=port, tell=lambda address: print(address, flush=True))
