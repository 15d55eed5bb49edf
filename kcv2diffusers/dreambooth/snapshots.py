"""Copies of a run's variables in host memory, which are written to disk during training."""

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
    """The current value of a variable."""
    return np.asarray(keras.ops.convert_to_numpy(variable))


class Snapshots:
    """Snapshots of `variables`, one at a time: a new one may overwrite the previous one.

    `bytes` is the host memory that a snapshot takes.
    """

    def __init__(self, variables: Sequence[keras.Variable]) -> None:
        self.variables = list(variables)
        self.bytes = sum(_bytes(variable) for variable in self.variables)
        self._memory: Any = None  # on PyTorch: reused, because its pages are locked

    def fits(self) -> bool:
        """Whether a snapshot takes at most half of the free memory."""
        return self._memory is not None or 2 * self.bytes <= free_memory()

    def take(self) -> Callable[[], Values]:
        """Copy all variables. Must be called between steps.

        The device may start the next step at once. The returned function waits until the copies are complete;
        any thread may call it.
        """
        if keras.backend.backend() == "torch":
            return self._take_from_torch()
        if keras.backend.backend() == "jax":
            for variable in self.variables:
                variable.value.copy_to_host_async()
        # Always copy: on a CPU, JAX arrays are views of memory that the next step overwrites.
        copies = {id(variable): np.array(current(variable)) for variable in self.variables}
        return lambda: lambda variable: copies[id(variable)]

    def _take_from_torch(self) -> Callable[[], Values]:
        import torch

        device = self.variables[0].value.device
        if self._memory is None:
            self._memory = torch.empty(self.bytes, dtype=torch.uint8)
            if device.type == "cuda":
                # Page-locked memory: the device copies into it asynchronously, and the host does not wait. If
                # the system allows no more locked pages, the host waits. PyTorch's pinned allocations would
                # be rounded up to a power of 2.
                cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
                cuda.cudaHostRegister(self._memory.data_ptr(), self.bytes, 0)
        copies, start = {}, 0
        with torch.no_grad():
            # 8-byte dtypes first, so that each copy is aligned to its item size.
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
    """Bytes of memory still available to this process.

    The limit is that of the machine or of the control group (container, batch job) of the process. Returns 0
    if the system does not report it.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free: float = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except (OSError, StopIteration):
        return 0
    for _, controllers, path in groups:
        if controllers == "":  # cgroup version 2
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
        # The page cache counts as used, but is reclaimed when memory is short.
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
    """A host tensor as an array that shares its memory; NumPy itself has no bfloat16."""
    import torch

    if tensor.dtype != torch.bfloat16:
        return np.asarray(tensor.numpy())
    return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
