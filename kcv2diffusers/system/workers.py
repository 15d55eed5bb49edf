"""Numbered jobs done side by side, by forked processes or by threads.

Processes are a fifth quicker: threads hand Python's lock to each other some ten thousand times. Where the
system has no safe fork (Windows, macOS) threads do the same.
"""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection, Pipe, wait
from tempfile import TemporaryFile
from typing import IO, Any, cast

from kcv2diffusers.errors import Error
from kcv2diffusers.system.processes import FORKS, fork

_NUMBER = 4  # bytes of a job's number
_COUNT = min(4, os.cpu_count() or 1)
_SECONDS = 0.2  # at most, until a thread that waits sees a signal: on Windows nothing else wakes it

Do = Callable[[int], Any]
Results = Generator[tuple[int, Any], None, None]


def work(numbers: Sequence[int], make: Callable[[], Do]) -> Results:
    """Do the jobs `numbers` in about that order; yields each with its result when it is done.

    `make` is called once in each process or thread and returns what does a job. An exception of a job ends
    the iteration and is raised here. Raises Error if a process is killed. Close the iterator, and nothing
    works on.
    """
    return (_processes if FORKS else _threads)(numbers, make, min(_COUNT, len(numbers)))


def _threads(numbers: Sequence[int], make: Callable[[], Do], count: int) -> Results:
    from concurrent.futures import ThreadPoolExecutor

    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    left = iter(numbers)  # a step of it is one operation for Python: no two threads get the same

    def serve() -> None:
        try:
            do = make()
            for number in left:
                results.put((number, do(number)))
        except BaseException as error:
            # Without its frames, as from a process: they would keep mapped files open.
            results.put(error.with_traceback(None))
        else:
            results.put(None)

    with ThreadPoolExecutor(max(1, count), "conversion") as pool:
        for _ in range(count):
            pool.submit(serve)
        try:
            while count:
                try:
                    result = results.get(timeout=_SECONDS)
                except queue.Empty:
                    continue
                if isinstance(result, BaseException):
                    raise result
                if result is None:
                    count -= 1
                else:
                    yield result
        finally:
            for _ in left:  # what is being done ends; nothing more begins
                pass


def _processes(numbers: Sequence[int], make: Callable[[], Do], count: int) -> Results:
    """A process takes the number of its next job from a file that all share, so that it never waits to be
    handed one, and sends back what it found; it ends when the parent is gone.
    """
    with ExitStack() as stack:
        # Processes that were forked share the position in it: each reads numbers that no other has read.
        jobs = stack.enter_context(_scratch())
        jobs.write(b"".join(number.to_bytes(_NUMBER) for number in numbers))
        jobs.seek(0)
        busy = [stack.enter_context(_process(jobs.fileno(), make)) for _ in range(count)]
        while busy:
            for link in cast("list[Connection[Any, Any]]", wait(busy)):
                try:
                    result = link.recv()
                except (EOFError, ConnectionError):
                    raise Error(
                        "A process of the conversion was killed: memory ran out, or a source was cut "
                        "meanwhile.\nFree some memory, leave the sources alone, and try again."
                    ) from None
                if isinstance(result, Exception):
                    raise result
                if result is None:  # there are no more jobs
                    busy.remove(link)
                else:
                    yield result


def _scratch() -> IO[bytes]:
    """An empty file that is gone when it is closed: at once if in memory, when its journal has time if on
    disk.
    """
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("jobs"), "r+b", buffering=0)
    return TemporaryFile(buffering=0)


@contextmanager
def _process(jobs: int, make: Callable[[], Do]) -> Iterator[Connection[Any, Any]]:
    """A process that does the jobs whose numbers it reads from `jobs`, as long as the block lasts: a
    connection to receive each with its result from, or an exception, and at last None.
    """
    ours, theirs = Pipe(duplex=False)

    def serve() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
        ours.close()
        with suppress(ConnectionError):  # the parent has gone
            try:
                do = make()
                while taken := os.read(jobs, _NUMBER):
                    number = int.from_bytes(taken)
                    theirs.send((number, do(number)))
            except Exception as error:
                theirs.send(error)
            else:
                theirs.send(None)

    child = fork(serve)
    theirs.close()
    try:
        with ours:
            yield ours
    finally:
        os.kill(child, signal.SIGKILL)  # it is done, or what it does is not wanted any more
        os.waitpid(child, 0)
