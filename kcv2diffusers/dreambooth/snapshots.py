"""Copies of a run's variables in host memory, which are written to disk while training goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np

from kcv2diffusers.diffusion import Array

Values = Callable[[keras.Variable], Array]
"""The value of a variable as a NumPy array, at the time of a snapshot or now."""

_CGROUPS = Path("/sys/fs/cgroup")


def current(variable: keras.Variable) -> Array:
    """The value of a variable now."""
    return np.asarray(keras.ops.convert_to_numpy(variable))


class Snapshots:
    """Snapshots of `variables`, one at a time: a later one may overwrite the earlier.

    `bytes` is the host memory that one takes.
    """

    def __init__(self, variables: Sequence[keras.Variable]) -> None:
        self.variables = list(variables)
        self.bytes = sum(_bytes(variable) for variable in self.variables)
        self._memory: Any = None  # on PyTorch: kept from one to the next, because pages of it are locked

    def fits(self) -> bool:
        """Whether at most half of the free memory is needed."""
        return self._memory is not None or 2 * self.bytes <= free_memory()

    def take(self) -> Callable[[], Values]:
        """Copy all variables. To be called between steps; what it returns waits until the copies are
        complete, in any thread. The device may go on with the next step at once.
        """
        if keras.backend.backend() == "torch":
            return self._take_from_torch()
        if keras.backend.backend() == "jax":
            for variable in self.variables:
                variable.value.copy_to_host_async()
        # A copy in any case: on a CPU, arrays of JAX are views of what the next step overwrites.
        copies = {id(variable): np.array(current(variable)) for variable in self.variables}
        return lambda: lambda variable: copies[id(variable)]

    def _take_from_torch(self) -> Callable[[], Values]:
        import torch

        device = self.variables[0].value.device
        if self._memory is None:
            self._memory = torch.empty(self.bytes, dtype=torch.uint8)
            if device.type == "cuda":
                # Locked pages: the device copies into them by itself, and the host does not wait. Where the
                # system allows no more of them, it waits. PyTorch's own would be rounded up to a power of 2.
                cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
                cuda.cudaHostRegister(self._memory.data_ptr(), self.bytes, 0)
        copies, start = {}, 0
        with torch.no_grad():
            # 8-byte numbers first, so that each begins at a multiple of its size.
            for variable in sorted(self.variables, key=lambda v: -v.value.element_size()):
                value, size = variable.value, _bytes(variable)
                copy = self._memory[start : start + size].view(value.dtype).view(value.shape)
                copy.copy_(value, non_blocking=True)
                copies[id(variable)] = copy
                start += size
        copied: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if copied is not None:
            copied.record()

        def wait() -> Values:
            if copied is not None:
                copied.synchronize()
            return lambda variable: _as_array(copies[id(variable)])

        return wait


def free_memory() -> int:
    """Bytes of memory that this process may still take: of the machine, or of the control group (container,
    batch job) that it is in. 0 where the system does not say.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free: float = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except (OSError, StopIteration):
        return 0
    for _, controllers, path in groups:
        if controllers == "":  # version 2
            root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(root):
                free = min(free, _left_in(folder, *names))
    return max(0, int(free))


def _left_in(folder: Path, limit: str, used: str, cache: str) -> float:
    """Bytes left in a control group; infinite if it has no limit or is not visible here."""
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return math.inf
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # The file cache counts as used, and is given back when memory is short.
        return int(most) - int((folder / used).read_text()) + int(stat.get(cache, 0))
    except (OSError, ValueError):
        return math.inf


def _bytes(variable: keras.Variable) -> int:
    return int(math.prod(variable.shape) * dtype_of(variable).itemsize)


def dtype_of(variable: keras.Variable) -> np.dtype[Any]:
    """The NumPy dtype of a variable's values."""
    name = keras.backend.standardize_dtype(variable.dtype)
    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    return found


def _as_array(tensor: Any) -> Array:
    """A tensor in host memory as an array of the same memory; NumPy itself has no bfloat16."""
    import torch

    if tensor.dtype != torch.bfloat16:
        return np.asarray(tensor.numpy())
    return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
