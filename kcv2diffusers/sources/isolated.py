"""Run a function in a child process of its own.

On damaged metadata libhdf5 crashes, loops without end or asks for all memory (about one in a hundred files
with a few bytes changed; tests/sources/test_fuzz.py makes them). In a child that costs the child: in a fork,
a few milliseconds and no second import; where the system has no safe fork, a process that is started once and
then asked one thing after the other.
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

CPU_SECONDS = 10.0  # what the largest genuine file needs fifty times over
WALL_SECONDS = 300.0  # for slow disks; a child that cannot go on for any other reason ends here
MEMORY = 1 << 30  # bytes beyond those of the parent
_SPAWNED_SECONDS = 60.0  # of a process that cannot count what it computes
_KEPT = 4  # processes that wait for more work
_READY = b"\n"  # the first thing that such a process says
_SIZE = 8  # bytes of the size of a result

Work = Callable[..., bytes | memoryview]


class Died(Exception):
    """The child crashed or reached a limit, or its function raised something."""


class Child(Protocol):
    """A child process that computes something."""

    def result(self) -> bytes:
        """Wait for the result, once. Raises Died, Error if there is no child."""

    def stop(self) -> None:
        """End it: its result is not wanted any more."""


def start(work: Work, *arguments: Any, extra: int = 0) -> Child:
    """A child process that computes `work(*arguments)`, from now on.

    `work` is a function of a module, the arguments are of JSON's types. `extra` is the size in bytes of a
    result that is expected to be large.
    """
    return (_Forked if FORKS else _Spawned)(work, arguments, extra)


def isolated(work: Work, *arguments: Any, extra: int = 0) -> bytes:
    """What `work(*arguments)` returns, computed in a child process (see `start`). Raises Died."""
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
    with suppress(OSError, ValueError):  # where there is no /proc, or a lower limit already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + MEMORY + 2 * extra
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # glibc says there what it aborts for


class _Spawned:
    """Asks a process of `serve`, one that waits or a new one. Its time is limited, its memory is not."""

    _waiting: list[Popen[bytes]] = []  # noqa: RUF012 - of all

    def __init__(self, work: Work, arguments: tuple[Any, ...], extra: int) -> None:
        from subprocess import DEVNULL, PIPE

        seconds = _SPAWNED_SECONDS + extra / 1e6
        request = json.dumps([work.__module__, work.__qualname__, arguments, seconds]).encode() + b"\n"
        self._new, found = False, None
        while found is None or found.poll() is not None:  # one may have died while it waited
            try:
                found = self._waiting.pop()
            except IndexError:
                found, self._new = start_module(__name__, stdin=PIPE, stdout=PIPE, stderr=DEVNULL), True
                break
        self._process: Popen[bytes] = found
        assert self._process.stdin is not None
        with suppress(OSError):  # it has died, which `result` sees
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
                with suppress(OSError):  # what was written and not yet read
                    pipe.close()


def serve() -> None:
    """What a process of `_Spawned` does: it ends with its input, or with the first thing that goes wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
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
