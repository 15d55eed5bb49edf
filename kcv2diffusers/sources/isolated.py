"""Run a function in a child process of its own.

On damaged metadata libhdf5 crashes, loops without end or asks for all memory (about one in a hundred files
with a few bytes changed; tests/test_fuzz.py makes them). In a fork that costs the child, a few milliseconds
and no second import.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kcv2diffusers.processes import fork

CPU_SECONDS = 10.0  # what the largest genuine file needs fifty times over
WALL_SECONDS = 300.0  # for slow disks; a child that cannot go on for any other reason ends here
MEMORY = 1 << 30  # bytes beyond those of the parent


class Died(Exception):
    """The child crashed or reached a limit, or its function raised something."""


class Child:
    """A child process that computes what `work` returns; it starts at once.

    `extra` is the size in bytes of a result that is expected to be large.
    """

    def __init__(self, work: Callable[[], bytes | memoryview], extra: int = 0) -> None:
        self._read, write = os.pipe()

        def run() -> None:
            os.close(self._read)
            _limit(extra)
            with os.fdopen(write, "wb") as pipe:
                pipe.write(work())

        self._process = fork(run)
        os.close(write)

    def result(self) -> bytes:
        """Wait for the result, once. Raises Died."""
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
        """End it: its result is not wanted any more."""
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._read)


def isolated(work: Callable[[], bytes | memoryview], extra: int = 0) -> bytes:
    """What `work` returns, computed in a child process. Raises Died."""
    return Child(work, extra).result()


def _limit(extra: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS + extra / 10e6)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS + extra / 1e6)
    with suppress(OSError, ValueError):  # where there is no /proc, or a lower limit already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + MEMORY + 2 * extra
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # glibc says there what it aborts for
