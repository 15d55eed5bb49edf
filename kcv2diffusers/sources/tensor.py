"""A stored array of a checkpoint: name, shape, dtype and location in the file, without the values."""

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

    `name` is the name in the container. `shape` and `dtype` are as stored (little endian; bfloat16 is
    `ml_dtypes.bfloat16`). The values are C-contiguous at byte `offset` of the file `path`. If a container
    stores them in another form (chunked or compressed HDF5, pickles), `offset` is None and `load` returns
    the whole array. `crc32c` is the unmasked checksum of the bytes, if one is stored.
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
    """All values of a tensor, in its shape and dtype. Raises SourceError if the file ends within it."""
    if tensor.load is not None:
        return np.asarray(tensor.load()).reshape(tensor.shape)
    count = math.prod(tensor.shape)
    values = np.fromfile(tensor.path, tensor.dtype, count, offset=tensor.offset or 0)
    if values.size != count:
        raise SourceError(tensor.path, f"{tensor.name}: the file ends within it.")
    return values.reshape(tensor.shape)


def rows(tensor: Tensor, first: int, count: int) -> Tensor:
    """The slice of `count` rows of a tensor along axis 0, from row `first` on, without a checksum."""
    shape = (count, *tensor.shape[1:])
    if tensor.load is not None:
        load = tensor.load
        return replace(tensor, shape=shape, load=lambda: load()[first : first + count], crc32c=None)
    share = replace(tensor, shape=shape, crc32c=None)
    row = share.nbytes // count if count else 0
    return replace(share, offset=(tensor.offset or 0) + first * row)
