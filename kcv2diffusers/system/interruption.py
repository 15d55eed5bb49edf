"""Signal handling: a command that receives SIGINT (Ctrl-C) or SIGTERM ends with exit code 130 or 143.

The first signal raises `Interrupted` in the main thread, so that temporary files are removed. If a library
swallows the exception, it is raised again. The second signal ends the process at once, even while the main
thread is busy in compiled code.
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
_SECONDS_TO_CLEAN_UP = 10  # then `Interrupted` is raised again: the apparent clean-up is the work going on
_ONE_PRESS = 0.3  # seconds within which signals count as one: wrappers forward what a terminal sends to all

# False on Windows: there a second signal waits for the main thread, and a swallowed exception is lost.
_WATCHED = hasattr(signal, "pthread_kill") and hasattr(signal, "pthread_sigmask")

_received, _at, _kept = 0, 0.0, "nothing was written"
_watching = False


_leaving: list[str] = []  # the message of each active `ends_at_once` block


class Interrupted(SystemExit):
    """Raised when the command has to end; `code` is its exit code."""


def keeps(words: str) -> None:
    """Set the last clause of the interruption message: what an interruption leaves from now on."""
    global _kept
    _kept = words


@contextmanager
def ends_at_once(words: str) -> Iterator[None]:
    """A block in which the first signal ends the process at once.

    It is for blocks whose threads an ordinary exit would wait for. They must have no temporary files.
    `words` is the last clause of the interruption message.
    """
    _leaving.append(words)
    try:
        yield
    finally:
        _leaving.pop()


@contextmanager
def interruptible() -> Iterator[None]:
    """Wrap the whole work of a command, from its first import on.

    A signal ends the process by SystemExit with code 128 + signal number.
    """
    try:
        _listen()  # a signal blocked so far is delivered here
        yield
        if _received:  # a library swallowed the exception
            raise Interrupted
    except BaseException:
        if not _received:
            raise
        # Also if a library has replaced `Interrupted` by another exception.
        os.write(2, f"kcv2diffusers: interrupted; {_kept}.\n".encode(errors="replace"))
        raise SystemExit(128 + _received) from None
    finally:
        for number in SIGNALS:
            signal.signal(number, lambda number, _: os._exit(128 + number))
        if _WATCHED:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        gc.freeze()  # avoids a last garbage collection at exit, a tenth of the time of `inspect`


def is_watching() -> bool:
    """Whether a thread ends this process at a second signal, whatever the handlers of signals do."""
    return _watching


def hold_signals() -> None:
    """Block the signals until `interruptible` starts. The block survives `exec` into another program."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _listen() -> None:
    global _watching
    sys.unraisablehook = _shown(sys.unraisablehook)
    sys.excepthook = _shown(sys.excepthook)  # Cython calls it for exceptions that it cannot raise
    for number in SIGNALS:
        signal.signal(number, _first)
    if not _WATCHED:
        return
    hold_signals()  # the thread started here inherits the mask and must receive no signal
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    Thread(target=_watch, args=(reading,), daemon=True).start()
    _watching = True
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _first(number: int, _: FrameType | None) -> None:
    """Handle the first signal: leave by an exception, so that temporary folders are removed."""
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
    """Raise `Interrupted` again, unless the main thread is already cleaning up after it."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    if error is None or time.monotonic() - _at > _SECONDS_TO_CLEAN_UP:
        raise Interrupted(128 + _received)


def _watch(signals: int) -> None:
    """Read signal numbers from the wake-up pipe as they arrive, whatever the main thread does."""
    first = None
    while True:
        wait = None if first is None else _SECONDS_BETWEEN_REMINDERS
        if not select.select([signals], [], [], wait)[0]:
            if _received:  # otherwise `_first` is not installed or has not run yet
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
    """Wrap the hook `show` so that it prints nothing after a signal.

    An exception that cannot be raised then, as in a destructor, is caused by the interrupted work. If it is
    `Interrupted` itself, that is raised again.
    """

    def hook(*what: Any) -> None:
        if not _received:
            show(*what)

    return hook
