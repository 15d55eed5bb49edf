"""The command app: the web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kcv2diffusers.cli.progress import tell


def app(
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on. 0.0.0.0: other computers too.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(metavar="N", help="Port (default: a free one from 7860).")
    ] = None,
    max_size: Annotated[
        float, typer.Option(metavar="GB", help="Size of the largest file, uploaded, downloaded or written.")
    ] = 8.0,
    time_limit: Annotated[float, typer.Option(metavar="MINUTES", help="Time limit of a command.")] = 120.0,
    no_train: Annotated[bool, typer.Option("--no-train", help="Offer no training.")] = False,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for temporary files (default: the system's).")
    ] = None,
) -> None:
    """Serve a web page with the commands.

    It converts, compares, trains and publishes. Ctrl-C ends it and removes its temporary files.
    """
    from kcv2diffusers.app.server import serve

    serve(
        host=host,
        port=port,
        work=work,
        most_gigabytes=max_size,
        minutes=time_limit,
        trains=not no_train,
        say=lambda address: tell(f"Open {address}"),
    )
