"""Run a function in an isolated child process.

On damaged metadata libhdf5 crashes, loops forever or allocates all memory (about one in a hundred files with
a few bytes changed; tests/sources/test_fuzz.py generates them). In a child only the child is lost. The child
is a fork, which takes a few milliseconds and needs no second import. Where the system has no safe fork, it is
a process that is started once and then serves one request after the other.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kcv2diffusers.errors import Error
from kcv2diffusers.system.processes import FORKS, fork, start_module

if TYPE_CHECKING:
    from subprocess import Popen

CPU_SECONDS = 10.0  # fifty times what the largest genuine file needs
WALL_SECONDS = 300.0  # long enough for slow disks; it also ends a child that hangs
MEMORY = 1 << 30  # bytes in addition to those of the parent
_SPAWNED_SECONDS = 60.0  # wall-clock limit of a spawned process, whose CPU time is not limited
_KEPT = 4  # idle processes kept for later requests
_READY = b"\n"  # the first output of such a process
_SIZE = 8  # bytes of the length field before a result

Work = Callable[..., bytes | memoryview]


class Died(Exception):
    """The child crashed, reached a limit, or its function raised an exception."""


class Child(Protocol):
    """A child process that computes something."""

    def result(self) -> bytes:
        """Wait for the result; call it once. Raises Died, and Error if no child can be started."""

    def stop(self) -> None:
        """End the child; its result is no longer needed."""


def start(work: Work, *arguments: Any, extra: int = 0) -> Child:
    """Start a child process that computes `work(*arguments)`.

    `work` is a module-level function; the arguments have JSON types. `extra` is the expected size in bytes of
    a large result; it raises the limits of time and memory.
    """
    return (_Forked if FORKS else _Spawned)(work, arguments, extra)


def isolated(work: Work, *arguments: Any, extra: int = 0) -> bytes:
    """Compute `work(*arguments)` in a child process and return the result; see `start`. Raises Died."""
    return start(work, *arguments, extra=extra).result()


class _Forked:
    def __init__(self, work: Work, arguments: tuple[Any, ...], extra: int) -> None:
        self._read, write = os.pipe()

        def run() -> None:
            os.close(self._read)
            _limit(extra)
            with os.fdopen(write, "wb") as pipe:
                pipe.write(work(*arguments))

        self._process = fork(run)
        os.close(write)

    def result(self) -> bytes:
        try:
            with os.fdopen(self._read, "rb", buffering=0) as pipe:
                result = pipe.readall()
        except BaseException:
            os.kill(self._process, signal.SIGKILL)
            raise
        finally:
            status = os.waitpid(self._process, 0)[1]
        if status:
            raise Died(f"exit status {os.waitstatus_to_exitcode(status)}")
        return result

    def stop(self) -> None:
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._read)


def _limit(extra: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS + extra / 10e6)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS + extra / 1e6)
    with suppress(OSError, ValueError):  # there is no /proc, or the limit is lower already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + MEMORY + 2 * extra
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides what glibc prints when it aborts


class _Spawned:
    """A request to a process that runs `serve`, idle or new. Its time is limited, its memory is not."""

    _waiting: list[Popen[bytes]] = []  # noqa: RUF012 - shared by all instances

    def __init__(self, work: Work, arguments: tuple[Any, ...], extra: int) -> None:
        from subprocess import DEVNULL, PIPE

        seconds = _SPAWNED_SECONDS + extra / 1e6
        request = json.dumps([work.__module__, work.__qualname__, arguments, seconds]).encode() + b"\n"
        self._new, found = False, None
        while found is None or found.poll() is not None:  # an idle process may have died
            try:
                found = self._waiting.pop()
            except IndexError:
                found, self._new = start_module(__name__, stdin=PIPE, stdout=PIPE, stderr=DEVNULL), True
                break
        self._process: Popen[bytes] = found
        assert self._process.stdin is not None
        with suppress(OSError):  # it has died; `result` detects that
            self._process.stdin.write(request)
            self._process.stdin.flush()

    def result(self) -> bytes:
        pipe = self._process.stdout
        assert pipe is not None
        try:
            if self._new and pipe.read(1) != _READY:
                raise Error(
                    f"{sys.executable}: cannot be started once more, to read HDF5 files.\n"
                    "Check that kcv2diffusers is installed in that Python."
                )
            size = int.from_bytes(head, "little") if len(head := pipe.read(_SIZE)) == _SIZE else -1
            result = pipe.read(max(0, size))
        except BaseException:
            self.stop()
            raise
        if size < 0 or len(result) < size:
            self.stop()
            raise Died(f"exit status {self._process.returncode}")
        self._waiting.append(self._process)
        if len(self._waiting) > _KEPT:
            self._process = self._waiting.pop(0)
            self.stop()
        return result

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # unread data in the pipe
                    pipe.close()


def serve() -> None:
    """Serve the requests of `_Spawned`, until the end of the input or the first error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it
    sys.stdout.buffer.write(_READY)
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        module, name, arguments, seconds = json.loads(line)
        faulthandler.dump_traceback_later(seconds, exit=True)
        result = memoryview(attrgetter(name)(import_module(module))(*arguments))
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.buffer.write(result.nbytes.to_bytes(_SIZE, "little"))
        sys.stdout.buffer.write(result)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
