"""A stored array of a checkpoint: name, shape, dtype and location in the file, without the values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path

import numpy as np

from kcv2diffusers.errors import SourceError


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file.

    `name` is the name in the container. `shape` and `dtype` are as stored (little endian; bfloat16 is
    `ml_dtypes.bfloat16`). The values are C-contiguous at byte `offset` of the file `path`. If a container
    stores them in another form (chunked or compressed HDF5, pickles), `offset` is None and `load` returns
    the whole array. `crc32c` is the unmasked checksum of the bytes, if one is stored.

    If `pitch` is given, the tensor is a range of columns of a larger one: `pitch` is the distance of its rows
    (all axes but the last) in elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    path: Path
    offset: int | None
    load: Callable[[], np.ndarray] | None = None
    crc32c: int | None = None
    pitch: int | None = None

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Bytes in the file from the first value to the last."""
        if self.pitch is None or not self.nbytes:
            return self.nbytes
        width = self.shape[-1]
        return ((math.prod(self.shape) // width - 1) * self.pitch + width) * self.dtype.itemsize

    def view(self, data: memoryview | mmap, offset: int) -> np.ndarray:
        """The values in a buffer that has them from byte `offset` on: an array of one axis, or rows."""
        if self.pitch is None:
            return np.frombuffer(data, np.uint8, self.nbytes, offset).view(self.dtype)
        width, size = self.shape[-1], self.dtype.itemsize
        shape = (math.prod(self.shape) // width, width) if width else (0, 0)
        return np.ndarray(shape, self.dtype, data, offset, (self.pitch * size, size))


def values_of(tensor: Tensor) -> np.ndarray:
    """All values of a tensor, in its shape and dtype. Raises SourceError if the file ends within it."""
    if tensor.load is not None:
        return np.asarray(tensor.load()).reshape(tensor.shape)
    data = np.fromfile(tensor.path, np.uint8, tensor.extent, offset=tensor.offset or 0)
    if data.size != tensor.extent:
        raise SourceError(tensor.path, f"{tensor.name}: the file ends within it.")
    return tensor.view(data.data, 0).reshape(tensor.shape)


def in_memory(name: str, values: np.ndarray, path: Path) -> Tensor:
    """A tensor whose values are in memory. `path` is the file that error messages name."""
    return Tensor(name, values.shape, values.dtype, path, None, load=lambda: values)


def columns(tensor: Tensor, first: int, count: int) -> Tensor:
    """The slice of `count` columns (last axis) of a tensor, from column `first` on, without a checksum."""
    shape = (*tensor.shape[:-1], count)
    if tensor.load is not None:
        load, whole = tensor.load, tensor.shape
        return replace(
            tensor,
            shape=shape,
            load=lambda: load().reshape(whole)[..., first : first + count],
            crc32c=None,
        )
    pitch = tensor.shape[-1] if len(shape) > 1 else None
    offset = (tensor.offset or 0) + first * tensor.dtype.itemsize
    return replace(tensor, shape=shape, crc32c=None, pitch=pitch, offset=offset)


def rows(tensor: Tensor, first: int, count: int) -> Tensor:
    """The slice of `count` rows of a tensor along axis 0, from row `first` on, without a checksum."""
    shape = (count, *tensor.shape[1:])
    if tensor.load is not None:
        load = tensor.load
        return replace(tensor, shape=shape, load=lambda: load()[first : first + count], crc32c=None)
    share = replace(tensor, shape=shape, crc32c=None)
    row = share.nbytes // count if count else 0
    return replace(share, offset=(tensor.offset or 0) + first * row)
