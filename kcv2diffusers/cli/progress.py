"""Output and progress: bars on a terminal, occasional lines in a log, no progress with --quiet."""

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
from kcv2diffusers.progress import EVERY

# Seconds before the first line in a log; minimum seconds between lines; maximum seconds without a line.
FIRST, THEN, SILENT = 5.0, 30.0, 60.0
_LOOK = 1.0  # seconds between checks of the time

_quiet = False


def be_quiet(wanted: bool) -> bool:
    """Print only errors and results from now on, if `wanted`."""
    global _quiet
    _quiet = wanted
    if wanted:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # huggingface_hub reads it when it is imported
    return wanted


def say(text: str, file: TextIO | None = None) -> None:
    """Print text with non-printable characters escaped, because names may come from files and servers."""
    print(plain(text, keep="\n"), file=file, flush=file is not None)


def tell(text: str) -> None:
    """Print what was done, unless --quiet is set."""
    if not _quiet:
        say(text)


def note(line: str) -> None:
    """Print a note on stderr, unless --quiet is set."""
    if not _quiet:
        say(line, sys.stderr)


def _intervals() -> tuple[float, float]:
    """Seconds before the first line in a log, and between lines."""
    try:
        seconds = float(os.environ[EVERY])
    except (KeyError, ValueError):
        return FIRST, THEN
    return seconds, seconds


class _Log:
    """Progress for a stderr that is not a terminal.

    The number of lines is limited, and a thread prints one if nothing was printed for `SILENT` seconds. Some
    work reports no progress: loading or compiling a model, downloading a file.
    """

    def __init__(self, title: str) -> None:
        self._at = title  # the last line reported
        self._started = self._printed = time.monotonic()
        self._first, self._then = _intervals()
        self._next = self._started + self._first
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Log:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def tell(self, line: str, *, last: bool = False) -> None:
        """Print a line if enough time has passed since the previous one; always if it is a stage's `last`."""
        self._at = line
        if last or time.monotonic() >= self._next:
            self._line(line)

    def _line(self, line: str) -> None:
        self._printed = time.monotonic()
        self._next = self._printed + self._then
        note(line)

    def _watch(self) -> None:
        while not self._end.wait(_LOOK):
            now = time.monotonic()
            if now - self._printed >= SILENT:
                self._line(f"{self._at}: still at work after {(now - self._started) / 60:.0f} min")


@contextmanager
def progress_bar(title: str, *, steps: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr, with bytes and rate, or with `steps`.

    The bar is visible from the first report to the last, because downloads before it and uploads after it
    have their own bars. If stderr is not a terminal, occasional lines are printed instead, and none for work
    that takes only seconds.
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
    """Show one progress bar for each stage on stderr.

    If stderr is not a terminal, occasional lines are printed instead, and one at the end of each stage.
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
