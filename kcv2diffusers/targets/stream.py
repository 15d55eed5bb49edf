"""Carry out a plan: bytes from source files to their offsets in target files, in parallel.

Where every byte goes is known beforehand, so tensors are independent jobs.
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

_LISTED = 8  # tensors that a refusal names


def run(
    jobs: Sequence[Job],
    advance: Callable[[int], None] = lambda _: None,
    worker: type[Worker] = Worker,
    after: Callable[[int], None] | None = None,
) -> list[Finding]:
    """Do all jobs; `advance` is called with the source bytes done. Returns what `worker` found, in the order
    of the jobs: by default the tensors that are not finite.

    `after` is called with the number of each job that is done; the jobs are then begun in the order given.

    Target files must exist at their final size. Raises SourceError if a source cannot be read or its
    checksum fails, OSError if a target cannot be written, Error if a process is killed.
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
    """Do all jobs, calling `progress` with the bytes done and in total; returns the total. `after` is as in
    `run`.

    Raises Error, listing the tensors, if values are not finite and that is not allowed.
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
    """The numbers of the jobs in the order to do them. All target files grow together, as the system lets
    one process at a time write to a file; large tensors come first, so that no process has one left when the
    others have ended.
    """
    whole, done = Counter[Path](), Counter[Path]()
    for job in jobs:
        whole[job.target] += job.tensor.nbytes
    shares: dict[int, float] = {}  # of its file, up to and with a job
    for number in sorted(range(len(jobs)), key=lambda number: -jobs[number].tensor.nbytes):
        target = jobs[number].target
        done[target] += jobs[number].tensor.nbytes
        shares[number] = done[target] / max(1, whole[target])
    return sorted(shares, key=shares.__getitem__)


def _open(stack: ExitStack, jobs: Sequence[Job], access: int) -> Files:
    """Each file once, until `stack` ends."""
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
    """The file in memory, to read."""
    with reading(path), path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise SourceError(path, "the file is empty.")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
