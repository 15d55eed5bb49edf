"""One stored array of a checkpoint: its name, shape, dtype and where its bytes lie, never the bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kcv2diffusers.errors import SourceError


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file.

    `name` is the container's own name for it. `shape` and `dtype` are as stored (little endian;
    bfloat16 is `ml_dtypes.bfloat16`). The bytes are C-contiguous at `offset` of `path`; where a
    container stores them otherwise (chunked or compressed HDF5) `offset` is None and `load`
    returns the whole array. `crc32c` is the unmasked checksum of the bytes, where one is stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    path: Path
    offset: int | None
    load: Callable[[], np.ndarray] | None = None
    crc32c: int | None = None

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def values_of(tensor: Tensor) -> np.ndarray:
    """All values of a tensor. Raises SourceError where its file ends within it."""
    if tensor.load is not None:
        return np.asarray(tensor.load()).reshape(tensor.shape)
    count = math.prod(tensor.shape)
    values = np.fromfile(tensor.path, tensor.dtype, count, offset=tensor.offset or 0)
    if values.size != count:
        raise SourceError(tensor.path, f"{tensor.name}: the file ends within it.")
    return values.reshape(tensor.shape)


def rows(tensor: Tensor, first: int, count: int) -> Tensor:
    """`count` rows of a tensor, along its first axis, from row `first` on."""
    shape = (count, *tensor.shape[1:])
    if tensor.load is not None:
        load = tensor.load
        return replace(tensor, shape=shape, load=lambda: load()[first : first + count], crc32c=None)
    share = replace(tensor, shape=shape, crc32c=None)
    row = share.nbytes // count if count else 0
    return replace(share, offset=(tensor.offset or 0) + first * row)
