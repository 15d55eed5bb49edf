"""The first level: every tensor of the pipeline equals its source, bit for bit.

The jobs are those of the conversion. Instead of writing, a worker reads the bytes at the place where the
conversion would write, and compares them. No framework is imported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from kcv2diffusers.errors import plain
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.system.positioned import read_at
from kcv2diffusers.targets.safetensors import diffusers_entries, together
from kcv2diffusers.targets.stream import run
from kcv2diffusers.targets.transfer import Finding, Job, Worker
from kcv2diffusers.verification.sides import Side

Advance = Callable[[int, int], None]
_PIECE = 128 << 10  # bytes compared at a time; they stay in the L2 cache


@dataclass(frozen=True)
class Difference(Finding):
    """A tensor that differs from its source: `count` of its `size` values differ, by at most `largest`."""

    count: int
    size: int
    largest: float


@dataclass
class Weights:
    """The result of the comparison, by part.

    `tensors` and `values` are counts. `dtypes` are the pipeline's. `problems` are messages that start with a
    tensor's name, and `differences` hold the figures of differing tensors. `broken` are parts with tensors
    that are missing, surplus, or of a wrong shape or dtype. `bytes` is the size of the compared source
    tensors.
    """

    tensors: dict[str, int] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    differences: dict[str, list[Difference]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    bytes: int = 0

    def failures(self) -> list[str]:
        """Every problem as a message, by part; missing and surplus tensors come first."""
        return [problem for problems in self.problems.values() for problem in problems]


def compare(sides: Mapping[str, Side], progress: Advance) -> Weights:
    """Compare the tensors of the parts that have a source.

    `progress` is called with the number of source bytes done and in total.
    """
    result, jobs = Weights(), dict[str, list[Job]]()
    for part, side in sides.items():
        if not side.given:
            continue
        problems = result.problems[part] = []
        jobs[part] = _jobs(side, sides, problems)
        result.tensors[part] = len({job.name for job in jobs[part]})
        result.values[part] = sum(job.tensor.nbytes // job.tensor.dtype.itemsize for job in jobs[part])
        result.dtypes[part] = ", ".join(sorted({job.dtype.name for job in jobs[part]}))
        if problems:
            result.broken.add(part)
    result.bytes = sum(job.tensor.nbytes for each in jobs.values() for job in each)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, result.bytes)

    found = {f.name: f for f in run([job for each in jobs.values() for job in each], advance, Comparer)}
    for part, each in jobs.items():
        names = dict.fromkeys(job.name for job in each)  # the pieces of a tensor have its name
        here = [found[name] for name in names if name in found]
        result.differences[part] = [f for f in here if isinstance(f, Difference)]
        result.problems[part] += [f"{f.name}: {f.problem}" for f in here]
    return result


def _jobs(side: Side, sides: Mapping[str, Side], problems: list[str]) -> list[Job]:
    """A job for each tensor that both have in the same shape; other tensors are added to `problems`."""
    folder = side.source.spec.table.folder
    rename = side.source.spec.table.rename
    stored: dict[str, Tensor] = {}
    if side.own is not None:
        stored = {str(rename(tensor.name)): tensor for tensor in side.own.source.flat if rename(tensor.name)}
    others = {
        tensor.name
        for other in sides.values()
        if other.component is side.component and other is not side and other.own is not None
        for tensor in other.own.found.values()
    }
    jobs = []
    for wanted in together(diffusers_entries(side.source), np.dtype("float32")):
        tensor = stored.pop(wanted.name, None)
        name, source = f"{folder}: {wanted.name}", wanted.entries[0].tensor
        if tensor is None:
            problems.append(
                f"{name}: missing, {plain(source.name)} of {plain(source.path.name)} has no place"
            )
        elif tensor.shape != wanted.shape:
            problems.append(f"{name}: is {list(tensor.shape)}, not {list(wanted.shape)}")
        elif tensor.dtype.kind in "iu":
            problems.append(f"{name}: is of {tensor.dtype.name}")
        else:
            at = tensor.offset or 0
            for entry in wanted.entries:
                jobs.append(Job(name, entry.tensor, entry.core, tensor.dtype, tensor.path, at))
                at += math.prod(entry.shape) * tensor.dtype.itemsize
    extra = [tensor for tensor in stored.values() if tensor.name not in others]
    stray = {tensor.name for tensor in side.component.stray}
    first = next(other for other in sides.values() if other.component is side.component and other.given)
    problems += [
        f"{folder}: {plain(tensor.name)}: has no source"
        for tensor in extra
        if tensor.name not in stray or side is first  # report the stray tensors of a file once
    ]
    return jobs


class Comparer(Worker):
    """Compares the bytes that a conversion would write with those in the file."""

    access = os.O_RDONLY

    def do(self, job: Job) -> Finding | None:
        """How the job's tensor differs, or that it is not finite; None if it is correct."""
        self.count, self.largest = 0, 0.0
        infinite = super().do(job)
        if not self.count:
            return infinite
        size = job.tensor.nbytes // job.tensor.dtype.itemsize
        problem = f"{self.count} of {size} values differ, by up to {self.largest:.3g}"
        if infinite:
            problem += f"; {infinite.problem}"
        return Difference(job.name, problem, self.count, size, self.largest)

    def write(self, job: Job, values: np.ndarray, start: int) -> None:
        """Compare contiguous target values from element `start` on with the file."""
        flat, fd = values.reshape(-1), self.files.write[job.target]
        step = _PIECE // flat.itemsize
        bits = np.dtype(f"u{flat.itemsize}")
        for first in range(0, flat.size, step):
            wanted = flat[first : first + step]
            stored = self.buffer("stored", wanted.shape, wanted.dtype)
            view = memoryview(stored.view(np.uint8).data)
            at = job.offset + (start + first) * flat.itemsize
            if read_at(fd, view, at) != len(view):
                raise OSError(0, "the file ends within its tensors", str(job.target))
            differ = wanted.view(bits) != stored.view(bits)
            if differ.any():
                self.count += int(np.count_nonzero(differ))
                with np.errstate(all="ignore"):
                    apart = np.abs(wanted.astype(np.float64) - stored.astype(np.float64))[differ]
                # A NaN or infinity on one side only counts as an infinite difference.
                self.largest = max(self.largest, float(np.where(np.isnan(apart), np.inf, apart).max()))
