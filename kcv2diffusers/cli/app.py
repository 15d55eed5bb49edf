"""The Typer app and exit handling."""

from __future__ import annotations

import json
import os
import sys
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer

from kcv2diffusers.cli.progress import say
from kcv2diffusers.errors import Error, plain

app = typer.Typer(
    help="Convert KerasCV Stable Diffusion checkpoints to diffusers pipelines and single files, and back.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

DEBUG = "KCV2DIFFUSERS_DEBUG"
_BUG = (
    "This is a mistake in kcv2diffusers. Please report it with the lines above, the command line and what "
    "`kcv2diffusers env` prints."
)


def _version(wanted: bool) -> None:
    if wanted:
        from kcv2diffusers.environment import own_version

        say(f"kcv2diffusers {own_version()}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Run the command line.

    An `Error` or OSError prints its message on stderr and gives exit code 1. The traceback is printed before
    it if the environment variable KCV2DIFFUSERS_DEBUG is set.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # the system's encoding may lack characters of a name
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except Error as error:
        _fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        hint = "" if _debugging() else f"\n{DEBUG}=1 shows where."
        _fail(f"{plain(error.filename or 'cannot go on')}: {error.strerror or error}.{hint}")
    except Exception as error:
        error.add_note(_BUG)  # Python prints notes below the traceback
        raise
    sys.exit(0)


def _debugging() -> bool:
    return os.environ.get(DEBUG, "0") not in ("", "0")


def _fail(message: str) -> NoReturn:
    """Print an error message and exit with code 1."""
    text = f"kcv2diffusers: {message}"
    if _debugging():
        import traceback

        text = f"{traceback.format_exc()}{text}"
    say(text, sys.stderr)
    sys.exit(1)


def print_json(data: Any) -> None:
    """Print a result as indented JSON. Values of types that JSON does not have become strings."""
    print(json.dumps(data, indent=2, default=str))
