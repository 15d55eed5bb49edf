"""What is printed, and progress: bars on a terminal, a line now and then in a log, nothing with --quiet."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from kcv2diffusers.errors import plain

# Seconds up to the first line in a log, and at least from one to the next; without anything new at most.
FIRST, THEN, SILENT = 5.0, 30.0, 60.0
_LOOK = 1.0  # seconds between looks at the clock

_quiet = False


def be_quiet(wanted: bool) -> bool:
    """Say nothing from now on but errors and what was asked for, if that is `wanted`."""
    global _quiet
    _quiet = wanted
    if wanted:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
    return wanted


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines for a person. Names in them may come from files and servers: none controls the terminal."""
    print(plain(text, keep="\n"), file=file, flush=file is not None)


def tell(text: str) -> None:
    """Print what was done, for whoever is not quiet."""
    if not _quiet:
        say(text)


def note(line: str) -> None:
    """Print a remark on stderr, for whoever is not quiet."""
    if not _quiet:
        say(line, sys.stderr)


class _Log:
    """Progress where stderr is no terminal: as long as the block lasts it is neither full of lines nor silent
    for minutes, also where nothing is told (a model is loaded or compiled, a file downloaded).
    """

    def __init__(self, title: str) -> None:
        self._at = title  # what was told last
        self._started = self._printed = time.monotonic()
        self._next = self._started + FIRST
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Log:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def tell(self, line: str, *, last: bool = False) -> None:
        """Print a line if it is time for one; the `last` of a stage always."""
        self._at = line
        if last or time.monotonic() >= self._next:
            self._line(line)

    def _line(self, line: str) -> None:
        self._printed = time.monotonic()
        self._next = self._printed + THEN
        note(line)

    def _watch(self) -> None:
        while not self._end.wait(_LOOK):
            now = time.monotonic()
            if now - self._printed >= SILENT:
                self._line(f"{self._at}: still at work after {(now - self._started) / 60:.0f} min")


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
        with _Log(title) as log:

            def line(done: int, total: int) -> None:
                size = f"{done}/{total}" if steps else f"{done / 1e9:.2f}/{total / 1e9:.2f} GB"
                log.tell(f"{title} {size}")

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
        with _Log("Starting") as log:

            def line(stage: str, done: int, total: int, words: str) -> None:
                log.tell(f"{stage} {done}/{total} {words}".rstrip(), last=done == total)

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
