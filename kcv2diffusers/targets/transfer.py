"""Transfer of one tensor from a source file to its offset in a target file, in slices.

The source is mapped into memory, which saves a copy and makes columns as fast to read as rows. The dtype is
cast and the axes are reversed block by block; then the block is written. Writing into a mapped target takes
longer, because the system fills new pages with zeros first. The size of the buffers does not depend on the
size of the tensor.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from kcv2diffusers.errors import SourceError
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.system.positioned import write_at
from kcv2diffusers.targets.casting import cast, is_finite

_SLICE = 1 << 20  # bytes of source per checksum step, and bytes of target per copy without a transpose
# Rows transposed at a time, and bytes of each row in the target's dtype. Such a block fits into the L2 cache.
# The L1 cache holds one cache line of every row, from which the next columns are read.
_ROWS, _WIDTH = 400, 1200
_PIECE = 1 << 18  # bytes of source copied to contiguous memory before they are cast
_BAND = 16 << 20  # bytes of target buffered before they are written
# Bytes per write call. The kernel caches the data of one call in a block of memory of that size. Large free
# blocks are those that a virtual machine has returned to its host: to get them back can take three times as
# long as the copy. Smaller blocks cost more work, which only one process at a time can do.
_WRITE = 1 << 18
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux, for which Python has no constant


@dataclass(frozen=True, slots=True)
class Job:
    """The transfer of one tensor: write `tensor` to `offset` (bytes) of `target` as `dtype`.

    `core` are the three axes to reverse (source order), None if the values keep their order. `name` is used
    in messages. If `pitch` is given, the values become a range of columns of a larger tensor: `pitch` is the
    distance of its rows in elements.
    """

    name: str
    tensor: Tensor
    core: tuple[int, int, int] | None
    dtype: np.dtype
    target: Path
    offset: int
    pitch: int | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem with a tensor."""

    name: str
    problem: str


class NotFinite(Finding):
    """A tensor has values that are NaN or infinite, in the source or only in the target dtype."""


@dataclass(frozen=True, slots=True)
class Files:
    """Open files by path: memory maps of sources, file descriptors of targets."""

    read: Mapping[Path, mmap.mmap]
    write: Mapping[Path, int]


class Worker:
    """Runs the jobs of one process, one at a time, with reused buffers."""

    access = os.O_WRONLY  # flags for opening target files

    def __init__(self, files: Files) -> None:
        self.files = files
        self.buffers: dict[str, np.ndarray] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return a view of a reused buffer: new memory costs a page fault every 4 KB."""
        nbytes = math.prod(shape) * dtype.itemsize
        if name not in self.buffers or self.buffers[name].nbytes < nbytes:
            self.buffers[name] = np.empty(nbytes, np.uint8)
        return self.buffers[name][:nbytes].view(dtype).reshape(shape)

    def do(self, job: Job) -> Finding | None:
        """Transfer one tensor. Returns a finding if a value is not finite in the target.

        Raises SourceError if the source cannot be read or its checksum is wrong.
        """
        self.finite = True
        with self.values(job.tensor) as source:
            if job.tensor.crc32c is not None:
                check_checksum(source, job.tensor)
            if job.core is None:
                self.copy(job, source)
            elif job.core[2] == 1:  # a matrix
                self.reverse(job, source.reshape(1, *job.core[:2]))
            elif job.core[0] <= job.core[2]:
                self.reverse(job, source.reshape(job.core))
            else:
                self.reverse_back(job, source.reshape(job.core))
            return None if self.finite else _not_finite(job, source)

    @contextmanager
    def values(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """Yield the values of a tensor, loaded or memory-mapped: one axis, or rows of a larger tensor.

        They are valid inside the block.
        """
        if tensor.load is not None:
            yield np.ascontiguousarray(tensor.load()).reshape(-1).view(tensor.dtype)
            return
        mapped, offset = self.files.read[tensor.path], tensor.offset or 0
        if offset + tensor.extent > len(mapped):
            raise SourceError(tensor.path, f"{tensor.name}: the file ends within it.")
        first = offset - offset % mmap.PAGESIZE
        pages = first, offset + tensor.extent - first
        advise = hasattr(mmap, "MADV_DONTNEED")  # not on Windows
        if advise and sys.platform == "linux":
            try:
                mapped.madvise(_POPULATE_READ, *pages)
            except OSError as error:
                if error.errno == errno.EFAULT:  # reading these pages would kill the process (SIGBUS)
                    problem = f"{tensor.name}: cannot be read; the file was cut meanwhile, or its disk fails."
                    raise SourceError(tensor.path, problem) from error
        yield tensor.view(mapped, offset)
        if advise:
            mapped.madvise(mmap.MADV_DONTNEED, *pages)

    def write(self, job: Job, values: np.ndarray, start: int) -> None:
        """Write contiguous values into the target, from element `start` of the tensor on.

        If the target's rows lie apart, the values must be whole rows.
        """
        if job.pitch is None:
            self.put(job, values, job.offset + start * values.itemsize)
            return
        first = start // values.shape[-1]
        for number, row in enumerate(values, first):
            self.put(job, row, job.offset + number * job.pitch * values.itemsize)

    def put(self, job: Job, values: np.ndarray, offset: int) -> None:
        """Write contiguous values into the target file at a byte offset."""
        fd, view = self.files.write[job.target], memoryview(values.reshape(-1).view(np.uint8).data)
        while view:
            done = write_at(fd, view[:_WRITE], offset)
            view, offset = view[done:], offset + done

    def bring(self, values: np.ndarray, into: np.ndarray) -> None:
        """Cast values into a contiguous array, and record whether they are finite there."""
        if values.dtype == into.dtype or values.flags.c_contiguous:
            cast(values, into)
        else:  # copy to contiguous memory first; casting strided data is slower
            step = max(1, _PIECE * len(values) // values.nbytes)
            for start in range(0, len(values), step):
                rows = values[start : start + step]
                together = self.buffer("together", rows.shape, rows.dtype)
                together[...] = rows
                cast(together, into[start : start + step])
        self.finite = self.finite and is_finite(into)

    def copy(self, job: Job, source: np.ndarray) -> None:
        """Transfer values in their stored order, cast to the target's dtype."""
        width = 1
        if source.ndim > 1 or job.pitch is not None:
            width = job.tensor.shape[-1]
            source = source.reshape(-1, width)
        step = max(1, _SLICE // (job.dtype.itemsize * width))
        for start in range(0, len(source), step):
            part = source[start : start + step]
            target = self.buffer("target", part.shape, job.dtype)
            self.bring(part, target)
            self.write(job, target, start * width)

    def reverse(self, job: Job, source: np.ndarray) -> None:
        """Transpose (few, rows, columns) to (columns, rows, few): matrices, and kernels to diffusers.

        One band of source columns is processed at a time, in blocks of source rows: the rows of all planes
        are cast into one block, which is transposed into the band.
        """
        planes, rows, columns = source.shape
        band = _band(columns, job.dtype.itemsize, rows * planes)
        step = _share(rows, _ROWS // planes)
        for left in range(0, columns, band):
            width = min(band, columns - left)
            target = self.buffer("target", (width, rows * planes), job.dtype)
            for top in range(0, rows, step):
                part = source[:, top : top + step, left : left + width].transpose(1, 0, 2)
                block = self.buffer("block", part.shape, job.dtype)
                self.bring(part, block)
                turned = block.reshape(-1, width).T
                target[:, top * planes : top * planes + turned.shape[1]] = turned
            self.write(job, target, left * rows * planes)

    def reverse_back(self, job: Job, source: np.ndarray) -> None:
        """Transpose (columns, rows, few) to (few, rows, columns): kernels to Keras.

        One band of target rows of all planes is processed at a time, in blocks of target columns.
        """
        columns, rows, planes = source.shape
        band = _band(rows, job.dtype.itemsize * planes, columns)
        step = _share(columns, _ROWS)
        for top in range(0, rows, band):
            height = min(band, rows - top)
            target = self.buffer("target", (planes, height, columns), job.dtype)
            for left in range(0, columns, step):
                part = source[left : left + step, top : top + height]
                block = self.buffer("block", part.shape, job.dtype)
                self.bring(part, block)
                target[:, :, left : left + len(part)] = block.transpose(2, 1, 0)
            for plane in range(planes):
                self.write(job, target[plane], (plane * rows + top) * columns)


def check_checksum(source: np.ndarray, tensor: Tensor) -> None:
    """Raise SourceError if the CRC-32C of the stored bytes is not the one stated by the container."""
    checksum, stored = 0, source.view(np.uint8)
    for start in range(0, stored.size, _SLICE):
        checksum = google_crc32c.extend(checksum, stored[start : start + _SLICE].tobytes())
    if checksum != tensor.crc32c:
        raise SourceError(
            tensor.path,
            f"{tensor.name}: the checksum does not match; the file is damaged.",
            "Copy or download it again.",
        )


def _share(length: int, most: int) -> int:
    """Return the size of a share if `length` is split into the fewest equal shares of at most `most`.

    `most` counts as at least 1.
    """
    return -(-length // -(-length // max(1, most)))


def _band(length: int, size: int, times: int) -> int:
    """Return how many of `length` columns to transpose at a time, with `size` bytes in each of `times` rows.

    The number is odd: if a large power of two divided the distance between the rows of a block, they would
    evict each other from the cache.
    """
    return _share(length, min(_WIDTH // size, -(-length // 2), _BAND // (times * size))) | 1


def _not_finite(job: Job, source: np.ndarray) -> NotFinite:
    """Return the finding that explains why the target of these values is not finite."""
    with np.errstate(all="ignore"):
        most = max(abs(float(source.max())), abs(float(source.min())))
    if math.isfinite(most):
        return NotFinite(job.name, f"reaches {most:.4g}, too large for {job.dtype.name}")
    return NotFinite(job.name, "has NaN or infinite values")
