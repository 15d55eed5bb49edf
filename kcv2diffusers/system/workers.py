"""A pool that runs numbered jobs in parallel, in forked processes or in threads.

Processes are used where fork is safe, threads elsewhere (Windows, macOS). Threads are 20 % slower: they
contend for the GIL, which changes hands some ten thousand times.
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

_NUMBER = 4  # bytes of a job number
_COUNT = min(4, os.cpu_count() or 1)
_SECONDS = 0.2  # longest delay before a waiting thread sees a signal: on Windows nothing else wakes it

Do = Callable[[int], Any]
Results = Generator[tuple[int, Any], None, None]


def work(numbers: Sequence[int], make: Callable[[], Do]) -> Results:
    """Run the jobs `numbers` in about that order; yields (number, result) as each job completes.

    `make` is called once in each process or thread; it returns the function that runs a job, which is called
    with the job's number. An exception in a job ends the iteration and is raised here. Raises Error if a
    process is killed. Closing the iterator stops the work.
    """
    return (_processes if FORKS else _threads)(numbers, make, min(_COUNT, len(numbers)))


def _threads(numbers: Sequence[int], make: Callable[[], Do], count: int) -> Results:
    from concurrent.futures import ThreadPoolExecutor

    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    left = iter(numbers)  # `next` is atomic in CPython: no two threads get the same number

    def serve() -> None:
        try:
            do = make()
            for number in left:
                results.put((number, do(number)))
        except BaseException as error:
            # Without its traceback, as from a process: the frames would keep mapped files open.
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
            for _ in left:  # running jobs finish; no new one starts
                pass


def _processes(numbers: Sequence[int], make: Callable[[], Do], count: int) -> Results:
    """Run the jobs in `count` forked processes.

    Each process reads its next job number from a shared file, so that it never waits for the parent to
    assign one, and sends the result back. It ends when the parent is gone.
    """
    with ExitStack() as stack:
        # Forked processes share the file position: each reads numbers that no other has read.
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
    """An empty file that is deleted when it is closed.

    It is in memory if the system supports that: closing a file on disk may wait for the journal.
    """
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("jobs"), "r+b", buffering=0)
    return TemporaryFile(buffering=0)


@contextmanager
def _process(jobs: int, make: Callable[[], Do]) -> Iterator[Connection[Any, Any]]:
    """A process that runs the jobs whose numbers it reads from the descriptor `jobs`, while the block lasts.

    Yields the connection to receive from: a (number, result) for each job, or an exception, and None at the
    end.
    """
    ours, theirs = Pipe(duplex=False)

    def serve() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it
        ours.close()
        with suppress(ConnectionError):  # the parent is gone
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
        os.kill(child, signal.SIGKILL)  # it is done, or its result is no longer needed
        os.waitpid(child, 0)
