"""Progress and notes: bars on a terminal, a line now and then in a log, nothing with --quiet."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FIRST, THEN = 5.0, 30.0  # seconds up to the first line in a log, and from one to the next

_quiet = False


def be_quiet(wanted: bool) -> bool:
    """Say nothing from now on but errors and what was asked for, if that is `wanted`."""
    global _quiet
    _quiet = wanted
    if wanted:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
    return wanted


def tell(text: str) -> None:
    """Print what was done, for whoever is not quiet."""
    if not _quiet:
        print(text)


def note(line: str) -> None:
    """Print a remark on stderr, for whoever is not quiet."""
    if not _quiet:
        print(line, file=sys.stderr, flush=True)


class _Clock:
    """Says when a log is due another line, so that it is neither silent for minutes nor full of lines."""

    def __init__(self) -> None:
        self._next = time.monotonic() + FIRST

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + THEN
        return True


@contextmanager
def progress_bar(title: str, *, steps: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes and rate, or with steps, on stderr, where that is a terminal, from the first word on
    to the last: downloads before it and uploads after it have bars of their own. Otherwise a line now and
    then; none for what is done in seconds.
    """
    if _quiet:
        yield lambda done, total: None
        return
    if not sys.stderr.isatty():
        clock = _Clock()

        def line(done: int, total: int) -> None:
            if clock.due():
                note(f"{title} {done}/{total}" if steps else f"{title} {done / 1e9:.2f}/{total / 1e9:.2f} GB")

        yield line
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
    """A bar for each stage on stderr, where that is a terminal; otherwise a line now and then, and one at the
    end of each stage.
    """
    if _quiet:
        yield lambda stage, done, total, words: None
        return
    if not sys.stderr.isatty():
        clock = _Clock()

        def line(stage: str, done: int, total: int, words: str) -> None:
            if clock.due() or done == total:
                note(f"{stage} {done}/{total} {words}".rstrip())

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
            bar.update(tasks[stage], completed=done, words=words)

        yield update
