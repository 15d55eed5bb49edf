"""One tensor's way from a source file to its offset in a target file, in slices.

`pread`, change the dtype, reverse axes block by block, `pwrite`; memory is bounded by the buffers, not by
the tensor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from kcv2diffusers.casting import cast, is_float, largest
from kcv2diffusers.errors import SourceError
from kcv2diffusers.sources.tensor import Tensor

_SLICE = 8 << 20  # bytes read at a time where the order of bytes stays
_BLOCK = 1 << 20  # bytes of source transposed at a time: a block and its result stay in the L2 cache
_SLAB = 64 << 20  # bytes of target collected before they are written
# The kernel keeps what is written at once in a block of memory of that size. Large free blocks are what a
# virtual machine has lent back to its host: getting them again can take three times as long as copying.
# Smaller ones are more work, done by one process at a time.
_WRITE = 1 << 18
_TILE = 128  # source rows of a block turned at a time on the way to Keras
_PAD = 16  # values between the rows of a gathered block, see `Worker.reverse`


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor's way: `tensor` to `offset` of `target` as `dtype`.

    `core` are the three axes to reverse (source order), None where the order of bytes stays.
    `name` is what messages call it.
    """

    name: str
    tensor: Tensor
    core: tuple[int, int, int] | None
    dtype: np.dtype
    target: Path
    offset: int


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a tensor."""

    name: str
    problem: str


class NotFinite(Finding):
    """Values that are NaN or infinite, in the source or only in the target dtype."""


@dataclass(frozen=True, slots=True)
class Files:
    """Open file descriptors by path: sources to read from, targets to write to."""

    read: Mapping[Path, int]
    write: Mapping[Path, int]


class Worker:
    """The buffers of one process, and the work on one tensor at a time."""

    access = os.O_WRONLY  # how it opens target files

    def __init__(self, files: Files) -> None:
        self.files = files
        self.buffers: dict[str, np.ndarray] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A view of a buffer that is kept: fresh memory costs a page fault every 4 KB."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        if name not in self.buffers or self.buffers[name].nbytes < nbytes:
            self.buffers[name] = np.empty(nbytes, np.uint8)
        return self.buffers[name][:nbytes].view(dtype).reshape(shape)

    def do(self, job: Job) -> Finding | None:
        source = _Reader(self.files.read.get(job.tensor.path, -1), job.tensor)
        if job.tensor.crc32c is not None:
            self.check(source, job.tensor)
        scan = _Scan(job)
        if job.core is None:
            self.copy(job, source, scan)
        elif job.core[0] <= job.core[2]:
            self.reverse(job, source, scan, job.core)
        else:
            self.reverse_back(job, source, scan, job.core)
        return scan.result()

    def check(self, source: _Reader, tensor: Tensor) -> None:
        checksum = 0
        for start in range(0, tensor.nbytes, _SLICE):
            buffer = self.buffer("source", (min(_SLICE, tensor.nbytes - start),), np.dtype(np.uint8))
            source.read(buffer, start)
            checksum = google_crc32c.extend(checksum, buffer.tobytes())
        if checksum != tensor.crc32c:
            raise SourceError(
                tensor.path,
                f"{tensor.name}: the checksum does not match; the file is damaged.",
                "Copy or download it again.",
            )

    def write(self, job: Job, values: np.ndarray, start: int) -> None:
        """Write contiguous target values from element `start` on."""
        fd, offset = self.files.write[job.target], job.offset + start * values.itemsize
        view = memoryview(values.reshape(-1).view(np.uint8).data)
        while view:
            done = os.pwrite(fd, view[:_WRITE], offset)
            view, offset = view[done:], offset + done

    def read(self, job: Job, source: _Reader, scan: _Scan, shape: tuple[int, ...], start: int) -> np.ndarray:
        """Source elements from `start` on, scanned, in the target dtype."""
        values = self.buffer("source", shape, job.tensor.dtype)
        source.read(values, start * values.itemsize)
        return self.cast(values, job.dtype, scan)

    def cast(self, values: np.ndarray, dtype: np.dtype, scan: _Scan) -> np.ndarray:
        """Contiguous values, scanned, in another dtype."""
        if values.dtype == dtype:
            scan(largest(values))
            return values
        result = self.buffer("cast", values.shape, dtype)
        scan(cast(values, result))
        return result

    def copy(self, job: Job, source: _Reader, scan: _Scan) -> None:
        size, step = job.tensor.nbytes // job.tensor.dtype.itemsize, _SLICE // job.tensor.dtype.itemsize
        for start in range(0, size, step):
            values = self.read(job, source, scan, (min(step, size - start),), start)
            self.write(job, values, start)

    def reverse(self, job: Job, source: _Reader, scan: _Scan, core: tuple[int, int, int]) -> None:
        """(few, rows, columns) -> (columns, rows, few): kernels on their way to diffusers.

        A slab of target columns at a time; into it, blocks of source rows: read each of the few planes,
        bring rows of all planes together, transpose. Rows of a block are kept a cache line apart from a
        power of two, or all of them would compete for the same few cache sets.
        """
        planes, rows, columns = core
        step = max(1, _BLOCK // (planes * columns * job.tensor.dtype.itemsize))
        slab = max(1, _SLAB // (rows * planes * job.dtype.itemsize))
        padded = self.buffer("gathered", (step, planes, columns + _PAD), job.dtype)
        for left in range(0, columns, slab):
            width = min(slab, columns - left)
            target = self.buffer("target", (width, rows * planes), job.dtype)
            for top in range(0, rows, step):
                height = min(step, rows - top)
                block = self.buffer("source", (planes, height, columns), job.tensor.dtype)
                for plane in range(planes):
                    start = (plane * rows + top) * columns
                    source.read(block[plane], start * job.tensor.dtype.itemsize)
                padded[:height, :, :columns] = self.cast(block, job.dtype, scan).transpose(1, 0, 2)
                flat = padded[:height].reshape(height * planes, columns + _PAD)
                target[:, top * planes : (top + height) * planes] = flat[:, left : left + width].T
            self.write(job, target, left * rows * planes)

    def reverse_back(self, job: Job, source: _Reader, scan: _Scan, core: tuple[int, int, int]) -> None:
        """(columns, rows, few) -> (few, rows, columns): kernels on their way to Keras."""
        columns, rows, planes = core
        step = max(1, _BLOCK // (rows * planes * job.tensor.dtype.itemsize))
        slab = max(1, min(planes, _SLAB // (rows * columns * job.dtype.itemsize)))
        for first in range(0, planes, slab):
            count = min(slab, planes - first)
            target = self.buffer("target", (count, rows, columns), job.dtype)
            for left in range(0, columns, step):
                width = min(step, columns - left)
                block = self.read(job, source, scan, (width, rows, planes), left * rows * planes)
                for tile in range(0, rows, _TILE):
                    part = block[:, tile : tile + _TILE, first : first + count]
                    target[:, tile : tile + _TILE, left : left + width] = part.transpose(2, 1, 0)
            self.write(job, target, first * rows * columns)


class _Reader:
    """A tensor's bytes, from the file or, unpacked once, from memory."""

    def __init__(self, fd: int, tensor: Tensor) -> None:
        self.fd, self.tensor = fd, tensor
        self.whole = (
            None if tensor.load is None else memoryview(tensor.load().reshape(-1).view(np.uint8).data)
        )

    def read(self, into: np.ndarray, start: int) -> None:
        """Fill the contiguous array with the tensor's bytes from `start` on."""
        view = memoryview(into.reshape(-1).view(np.uint8).data)
        if self.whole is not None:
            view[:] = self.whole[start : start + len(view)]
            return
        at = (self.tensor.offset or 0) + start
        while view:
            done = os.preadv(self.fd, [view], at)
            if done == 0:
                raise SourceError(self.tensor.path, f"{self.tensor.name}: the file ends within it.")
            view, at = view[done:], at + done


class _Scan:
    """Watches a tensor's values pass: their largest magnitude, see `casting.largest`."""

    def __init__(self, job: Job) -> None:
        self.job, self.largest = job, 0

    def __call__(self, magnitude: int) -> None:
        self.largest = max(self.largest, magnitude)

    def result(self) -> NotFinite | None:
        dtype = self.job.tensor.dtype
        if not is_float(dtype):
            return None
        with np.errstate(all="ignore"):
            value = np.array([self.largest], f"u{dtype.itemsize}").view(dtype)
            if not np.isfinite(value.astype(np.float64))[0]:
                return NotFinite(self.job.name, "has NaN or infinite values")
            if not np.isfinite(value.astype(self.job.dtype).astype(np.float64))[0]:
                return NotFinite(
                    self.job.name, f"reaches {float(value[0]):.4g}, too large for {self.job.dtype.name}"
                )
        return None
