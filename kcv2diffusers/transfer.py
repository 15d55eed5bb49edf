"""One tensor's way from a source file to its offset in a target file, in slices.

The source is mapped into memory, which saves a copy of it and lets columns be read as quickly as rows. Change
the dtype and reverse axes block by block, then `pwrite`: to write into mapped memory takes longer, because
the system fills it with zeros first. Buffers do not grow with the tensor.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from kcv2diffusers.casting import cast, is_float, largest
from kcv2diffusers.errors import SourceError
from kcv2diffusers.sources.tensor import Tensor

_SLICE = 1 << 20  # bytes checked at a time, and bytes of target copied where the order of bytes stays
# Bytes of source transposed at a time, which stay in the L2 cache: on the way to diffusers whole, on the way
# to Keras in tiles of `_TILE` source rows.
_BLOCK, _TILED_BLOCK, _TILE = 1 << 18, 1 << 20, 128
_BAND = 16 << 20  # bytes of target collected before they are written
# The kernel keeps what is written at once in a block of memory of that size. Large free blocks are what a
# virtual machine has lent back to its host: getting them again can take three times as long as copying.
# Smaller ones are more work, done by one process at a time.
_WRITE = 1 << 18
_POPULATE_READ = 22  # Linux' MADV_POPULATE_READ, which Python does not name


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
    """Open files by path: sources mapped into memory, descriptors of targets."""

    read: Mapping[Path, mmap.mmap]
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
        scan = _Scan(job)
        with self.values(job.tensor) as source:
            if job.tensor.crc32c is not None:
                self.check(source, job.tensor)
            if job.core is None:
                self.copy(job, source, scan)
            elif job.core[0] <= job.core[2]:
                self.reverse(job, source.reshape(job.core), scan)
            else:
                self.reverse_back(job, source.reshape(job.core), scan)
        return scan.result()

    @contextmanager
    def values(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """The values of a tensor, one after the other: unpacked, or in mapped memory during the block."""
        if tensor.load is not None:
            yield np.ascontiguousarray(tensor.load()).reshape(-1).view(tensor.dtype)
            return
        mapped, offset = self.files.read[tensor.path], tensor.offset or 0
        if offset + tensor.nbytes > len(mapped):
            raise SourceError(tensor.path, f"{tensor.name}: the file ends within it.")
        first = offset - offset % mmap.PAGESIZE
        pages = first, offset + tensor.nbytes - first
        if sys.platform == "linux":
            try:
                mapped.madvise(_POPULATE_READ, *pages)
            except OSError as error:
                if error.errno == errno.EFAULT:  # to touch these pages would end the process
                    problem = f"{tensor.name}: cannot be read; the file was cut meanwhile, or its disk fails."
                    raise SourceError(tensor.path, problem) from error
        yield np.frombuffer(mapped, np.uint8, tensor.nbytes, offset).view(tensor.dtype)
        mapped.madvise(mmap.MADV_DONTNEED, *pages)

    def check(self, source: np.ndarray, tensor: Tensor) -> None:
        checksum, stored = 0, source.view(np.uint8)
        for start in range(0, stored.size, _SLICE):
            checksum = google_crc32c.extend(checksum, stored[start : start + _SLICE].tobytes())
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

    def bring(self, values: np.ndarray, into: np.ndarray, scan: _Scan) -> None:
        """Copy values, scanned, into a contiguous array in its dtype."""
        if values.dtype == into.dtype:
            into[...] = values
            scan(largest(into))
        else:
            cast(values, into)
            scan(largest(values))

    def copy(self, job: Job, source: np.ndarray, scan: _Scan) -> None:
        step = _SLICE // job.dtype.itemsize
        for start in range(0, source.size, step):
            part = source[start : start + step]
            target = self.buffer("target", part.shape, job.dtype)
            self.bring(part, target, scan)
            self.write(job, target, start)

    def reverse(self, job: Job, source: np.ndarray, scan: _Scan) -> None:
        """(few, rows, columns) -> (columns, rows, few): kernels on their way to diffusers.

        A band of target columns at a time; into it, blocks of source rows: bring rows of all planes together,
        transpose.
        """
        planes, rows, columns = source.shape
        band = _share(columns, rows * planes * job.dtype.itemsize)
        step = max(1, _BLOCK // (planes * band * source.itemsize))
        for left in range(0, columns, band):
            width = min(band, columns - left)
            target = self.buffer("target", (width, rows * planes), job.dtype)
            for top in range(0, rows, step):
                part = source[:, top : top + step, left : left + width].transpose(1, 0, 2)
                block = self.buffer("block", part.shape, job.dtype)
                self.bring(part, block, scan)
                turned = block.reshape(-1, width).T
                target[:, top * planes : top * planes + turned.shape[1]] = turned
            self.write(job, target, left * rows * planes)

    def reverse_back(self, job: Job, source: np.ndarray, scan: _Scan) -> None:
        """(columns, rows, few) -> (few, rows, columns): kernels on their way to Keras.

        A band of target rows at a time, of all planes.
        """
        columns, rows, planes = source.shape
        band = _share(rows, columns * planes * job.dtype.itemsize)
        step = max(1, _TILED_BLOCK // (band * planes * source.itemsize))
        for top in range(0, rows, band):
            height = min(band, rows - top)
            target = self.buffer("target", (planes, height, columns), job.dtype)
            for left in range(0, columns, step):
                part = source[left : left + step, top : top + height]
                block = self.buffer("block", part.shape, job.dtype)
                self.bring(part, block, scan)
                for tile in range(0, height, _TILE):
                    turned = block[:, tile : tile + _TILE].transpose(2, 1, 0)
                    target[:, tile : tile + _TILE, left : left + len(part)] = turned
            for plane in range(planes):
                self.write(job, target[plane], (plane * rows + top) * columns)


def _share(length: int, nbytes: int) -> int:
    """How many of `length` rows or columns of `nbytes` each to take at a time: as many in every band."""
    bands = -(-length * nbytes // _BAND)
    return -(-length // min(bands, length))


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
