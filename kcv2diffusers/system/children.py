"""Child processes that carry out an order, and end when their parent does.

The order is written to the child's standard input, which then stays open: it closes when the parent ends,
however that happens, and a child that watches it (`end_with_parent`) ends too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from time import monotonic, sleep
from typing import IO, Any

from kcv2diffusers.errors import Error, plain
from kcv2diffusers.system.processes import start_module

_TAIL = 4096  # bytes of what a process printed last
_LOOK = 0.2  # seconds between two calls of `meanwhile`
_OWN_GROUP = hasattr(os, "killpg")


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, what it wrote, and why it was ended, "" if it ended itself."""

    code: int
    out: bytes
    err: str
    reason: str = ""

    def why(self, clean: Callable[[str], str] = str) -> str:
        """Why there is no result, in one line: the last line of an error passed to `clean`, or the signal."""
        if self.reason:
            return self.reason
        lines = self.err.strip().splitlines()
        how = f"ended by {signal.Signals(-self.code).name}" if self.code < 0 else f"ended with {self.code}"
        return f"its process {how}" + (f": {plain(clean(lines[-1].strip()))[:200]}" if lines else "")


def in_child(
    module: str,
    *arguments: str,
    order: bytes = b"",
    seconds: float | None = None,
    lock: int | None = None,
    env: Mapping[str, str] | None = None,
    grace: float = 0.0,
    meanwhile: Callable[[], None] | None = None,
) -> Ended:
    """Run a module of this package in a process of its own, for at most `seconds`.

    `order` is what it reads on its standard input. `lock` is a descriptor that it holds open for as long as
    it lives. If this call is interrupted the child is killed; with `grace` it is first asked to end, and left
    to end by itself if it takes more than that many seconds. `meanwhile` is called again and again.
    """
    inherited: dict[str, Any] = {"pass_fds": (lock,)} if lock is not None and os.name == "posix" else {}
    with TemporaryFile() as out, TemporaryFile() as err:
        child = start_module(
            module,
            *arguments,
            env=env,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            start_new_session=_OWN_GROUP,
            **inherited,
        )
        reason = ""
        try:
            with suppress(BrokenPipeError):
                child.stdin.write(order)
                child.stdin.flush()
            try:
                _wait(child, seconds, meanwhile)
            except subprocess.TimeoutExpired:
                reason = f"not done within {(seconds or 0) / 60:g} minutes"
        finally:
            if not (grace and child.poll() is None and _ends_itself(child, grace)):
                _kill(child)
        out.seek(0)
        return Ended(child.returncode, out.read(), _tail(err), reason)


def _wait(child: Any, seconds: float | None, meanwhile: Callable[[], None] | None) -> None:
    if meanwhile is None:
        child.wait(seconds)
        return
    deadline = None if seconds is None else monotonic() + seconds
    while child.poll() is None:
        meanwhile()
        if deadline is not None and monotonic() > deadline:
            raise subprocess.TimeoutExpired(child.args, seconds or 0)
        sleep(_LOOK)


def _ends_itself(child: Any, seconds: float) -> bool:
    """Ask a child to end. It may take its time: what it saves is needed to go on."""
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(seconds)
    with suppress(OSError):
        child.stdin.close()
    return True


def _kill(child: Any) -> None:
    """End a child and the processes that it started."""
    if _OWN_GROUP:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    child.wait()
    with suppress(OSError):
        child.stdin.close()


def _tail(err: IO[bytes]) -> str:
    err.seek(max(0, err.seek(0, os.SEEK_END) - _TAIL))
    return err.read().decode("utf-8", "replace")


def end_with_parent(ending: signal.Signals | None = None) -> None:
    """End this process when its standard input closes: at once, or by the signal `ending`."""

    def watch() -> None:
        with suppress(OSError):
            while os.read(0, 1):
                pass
        if ending is None:
            os._exit(1)
        os.kill(os.getpid(), ending)

    threading.Thread(target=watch, daemon=True).start()


def read_order() -> bytes:
    """The line that the parent wrote to the standard input; b"" if it ended before."""
    line = b""
    while not line.endswith(b"\n"):
        if not (more := os.read(0, 1 << 16)):
            return b""
        line += more
    return line


@contextmanager
def locked(file: Path, seconds: float, taken: str) -> Iterator[int | None]:
    """A lock on `file`, as a descriptor, which the processes of its owner hold too.

    Waits up to `seconds` for the processes of an owner that was killed to end. Raises Error with the message
    `taken` if they do not. Without locks (Windows) it is None.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield None
        return
    with file.open("w") as opened:
        deadline = monotonic() + seconds
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if monotonic() > deadline:
                    raise Error(taken) from None
                sleep(0.1)
        yield opened.fileno()
