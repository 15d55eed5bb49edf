"""One stored array of a checkpoint: its name, shape, dtype and where its bytes lie, never the bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


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
        return math.prod(self.shape) * self.dtype.itemsize
