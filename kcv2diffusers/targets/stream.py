"""Execution of a plan: tensors are copied from source files to their offsets in target files, in parallel.

All offsets are known in advance, so tensors are independent jobs.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from kcv2diffusers.errors import Error, SourceError, reading
from kcv2diffusers.progress import Progress
from kcv2diffusers.system.workers import Do, work
from kcv2diffusers.targets.transfer import Files, Finding, Job, Worker

_LISTED = 8  # tensors that an error message lists


def run(
    jobs: Sequence[Job],
    advance: Callable[[int], None] = lambda _: None,
    worker: type[Worker] = Worker,
    after: Callable[[int], None] | None = None,
) -> list[Finding]:
    """Run all jobs and return the findings of `worker`, by default non-finite tensors, in job order.

    `advance` is called with the source bytes of each finished job. `after` is called with the number of each
    finished job; if it is given, the jobs start in the given order.

    Target files must exist at their final size. Raises SourceError if a source cannot be read or its
    checksum is wrong, OSError if a target cannot be written, Error if a process is killed.
    """
    found: dict[int, Finding] = {}
    with ExitStack() as stack:
        files = _open(stack, jobs, worker.access)

        def make() -> Do:
            own = worker(files)
            return lambda number: own.do(jobs[number])

        order = range(len(jobs)) if after else _order(jobs)
        for number, finding in stack.enter_context(closing(work(order, make))):
            if finding is not None:
                found[number] = finding
            advance(jobs[number].tensor.nbytes)
            if after:
                after(number)
    return [found[number] for number in sorted(found)]


def run_finite(
    jobs: Sequence[Job],
    progress: Progress,
    *,
    allow_nonfinite: bool,
    after: Callable[[int], None] | None = None,
) -> int:
    """Run all jobs and return the total number of source bytes. `after` is as in `run`.

    `progress` is called with the bytes done and in total. Raises Error, which lists the tensors, if values
    are not finite, unless `allow_nonfinite` is set.
    """
    total, done = sum(job.tensor.nbytes for job in jobs), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    found = run(jobs, advance, after=after)
    if found and not allow_nonfinite:
        files = {job.name: job.tensor.path.name for job in jobs}
        lines = [f"  {files[f.name]}: {f.name} {f.problem}" for f in found[:_LISTED]]
        lines += [f"  and {len(found) - _LISTED} more"] if len(found) > _LISTED else []
        raise Error(
            "Values that are not finite:\n" + "\n".join(lines) + "\nIf they are only too large, convert as "
            "float32 or bfloat16; --allow-nonfinite writes them as they are."
        )
    return total


def _order(jobs: Sequence[Job]) -> list[int]:
    """Return the numbers of the jobs in the order of execution.

    All target files grow together, because the system lets only one process at a time write to a file. Large
    tensors come first, so that none is left to one process at the end while the others are idle.
    """
    whole, done = Counter[Path](), Counter[Path]()
    for job in jobs:
        whole[job.target] += job.tensor.nbytes
    shares: dict[int, float] = {}  # of the bytes of its file: those up to and including a job
    for number in sorted(range(len(jobs)), key=lambda number: -jobs[number].tensor.nbytes):
        target = jobs[number].target
        done[target] += jobs[number].tensor.nbytes
        shares[number] = done[target] / max(1, whole[target])
    return sorted(shares, key=shares.__getitem__)


def _open(stack: ExitStack, jobs: Sequence[Job], access: int) -> Files:
    """Open each file once. `stack` closes them."""
    sources: dict[Path, mmap.mmap] = {}
    targets: dict[Path, int] = {}
    for job in jobs:
        if job.tensor.load is None and job.tensor.path not in sources:
            sources[job.tensor.path] = stack.enter_context(_mapped(job.tensor.path))
        if job.target not in targets:
            targets[job.target] = os.open(job.target, access | getattr(os, "O_BINARY", 0))
            stack.callback(os.close, targets[job.target])
    return Files(sources, targets)


def _mapped(path: Path) -> mmap.mmap:
    """Map a file into memory, read-only. Raises SourceError if it is empty or cannot be read."""
    with reading(path), path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise SourceError(path, "the file is empty.")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
