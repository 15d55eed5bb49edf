"""The application, its way out, and how it shows progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import typer

from kcv2diffusers.errors import Error, plain

app = typer.Typer(
    help="Convert KerasCV Stable Diffusion checkpoints to diffusers pipelines, and back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> NoReturn:
    """Run the command line; every refusal is its message on stderr and exit code 1."""
    try:
        app()
    except Error as error:
        _fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        _fail(f"{plain(error.filename or 'cannot go on')}: {error.strerror or error}.")
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    """Print what went wrong."""
    say(f"kcv2diffusers: {message}", sys.stderr)
    sys.exit(1)


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines for a person. Names in them may come from files and servers: none controls the terminal."""
    print(plain(text, keep="\n"), file=file, flush=file is not None)


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, default=str))


@contextmanager
def progress_bar(title: str, *, steps: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes and rate, or with steps, on stderr, where that is a terminal, from the first word on
    to the last: downloads before it and uploads after it have bars of their own.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import progress
    from rich.console import Console

    sizes = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    counts = (progress.MofNCompleteColumn(),) if steps else sizes
    columns = (title, progress.BarColumn(), *counts, progress.TimeRemainingColumn())
    bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=None)

    def update(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    try:
        yield update
    finally:
        bar.stop()


@contextmanager
def stages() -> Iterator[Callable[[str, int, int, str], None]]:
    """A bar for each stage on stderr, where that is a terminal; otherwise a line now and then."""
    if not sys.stderr.isatty():

        def line(stage: str, done: int, total: int, words: str) -> None:
            if done == total or done % max(1, total // 10) == 0:
                say(f"{stage} {done}/{total} {words}".rstrip(), sys.stderr)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int, words: str) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, words="")
            bar.update(tasks[stage], completed=done, words=plain(words))

        yield update
