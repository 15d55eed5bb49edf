"""How a command ends when it is told to: by SIGINT (Ctrl-C) or SIGTERM, with exit code 130 or 143.

The first signal raises `Interrupted` in the main thread, so that temporary files go away; a library that
swallows it gets it again. The second ends the process at once, also while the main thread is busy in compiled
code.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread, main_thread
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_BETWEEN_REMINDERS = 0.25
_SECONDS_TO_CLEAN_UP = 10  # then `Interrupted` comes again: what looks like cleaning up is the work going on
_ONE_PRESS = 0.3  # seconds within which signals count as one: wrappers pass on what a terminal sends to all

# Not on Windows: there a second signal waits for the main thread, and one that a library swallows is lost.
_WATCHED = hasattr(signal, "pthread_kill") and hasattr(signal, "pthread_sigmask")

_received, _at, _kept = 0, 0.0, "nothing was written"


_leaving: list[str] = []  # the words of each `ends_at_once` that is running


class Interrupted(SystemExit):
    """The command is to end; `code` is its exit code."""


def keeps(words: str) -> None:
    """Say what an interruption leaves from now on: the end of its message, a clause."""
    global _kept
    _kept = words


@contextmanager
def ends_at_once(words: str) -> Iterator[None]:
    """A block that a signal ends with the process, as threads run in it that an exit would wait for. There
    must be no temporary files. `words` are the end of the message, a clause.
    """
    _leaving.append(words)
    try:
        yield
    finally:
        _leaving.pop()


@contextmanager
def interruptible() -> Iterator[None]:
    """The whole work of a command, from its first import on. Ends the process by SystemExit."""
    try:
        _listen()  # a signal may have waited for this
        yield
        if _received:  # and a library swallowed it
            raise Interrupted
    except BaseException:
        if not _received:
            raise
        # Also where a library has made another exception of it.
        os.write(2, f"kcv2diffusers: interrupted; {_kept}.\n".encode(errors="replace"))
        raise SystemExit(128 + _received) from None
    finally:
        for number in SIGNALS:
            signal.signal(number, lambda number, _: os._exit(128 + number))
        if _WATCHED:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        gc.freeze()  # or else Python looks through all objects once more before it ends, a tenth of `inspect`


def hold_signals() -> None:
    """Signals wait until `interruptible`, also in another program that this process becomes."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _listen() -> None:
    sys.unraisablehook = _shown(sys.unraisablehook)
    sys.excepthook = _shown(sys.excepthook)  # which Cython calls for what it cannot raise
    for number in SIGNALS:
        signal.signal(number, _first)
    if not _WATCHED:
        return
    hold_signals()  # the thread that starts here shall get none
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    Thread(target=_watch, args=(reading,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _first(number: int, _: FrameType | None) -> None:
    """Leave by an exception, so that temporary folders go away."""
    global _received, _at
    if _received:
        if not _WATCHED and time.monotonic() - _at > _ONE_PRESS:
            _end_at_once(number)
        return
    if _leaving:
        os.write(2, f"kcv2diffusers: interrupted; {_leaving[-1]}.\n".encode(errors="replace"))
        os._exit(128 + number)
    if _WATCHED:
        signal.signal(signal.SIGUSR1, _again)
    _received, _at = number, time.monotonic()
    raise Interrupted(128 + number)


def _again(_: int, __: FrameType | None) -> None:
    """Raise `Interrupted` once more unless the main thread is cleaning up after it."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    if error is None or time.monotonic() - _at > _SECONDS_TO_CLEAN_UP:
        raise Interrupted(128 + _received)


def _watch(signals: int) -> None:
    """Read the numbers of signals as they come, whatever the main thread does."""
    first = None
    while True:
        wait = None if first is None else _SECONDS_BETWEEN_REMINDERS
        if not select.select([signals], [], [], wait)[0]:
            if _received:  # or else `_first` is not in charge, or has not been called yet
                signal.pthread_kill(main_thread().ident or 0, signal.SIGUSR1)
            continue
        for number in os.read(signals, 64):
            if number in SIGNALS:
                now = time.monotonic()
                if first is not None and now - first > _ONE_PRESS:
                    _end_at_once(number)
                first = first or now


def _end_at_once(number: int) -> NoReturn:
    os.write(2, b"kcv2diffusers: ended at once; temporary files may be left, which the next run removes.\n")
    os._exit(128 + number)


def _shown(show: Callable[..., object]) -> Callable[..., None]:
    """`show`, but not after a signal: what cannot be raised then, in a destructor, comes of what was left
    half done. If it was `Interrupted` itself, that comes again.
    """

    def hook(*what: Any) -> None:
        if not _received:
            show(*what)

    return hook
