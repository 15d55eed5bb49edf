"""Peak memory of a computation on PyTorch, estimated on fake tensors without allocating it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

Tensor = torch.Tensor
Batch = Mapping[str, np.ndarray[Any, Any]]


def step_bytes(model: Any, batch: Batch) -> int:
    """Peak bytes of the forward and backward pass of a DreamBooth `model` on `batch`.

    Weights and the gradients that are kept are not counted.
    """

    values = [variable.value for variable in model.trainable_variables]

    def run(given: dict[str, Tensor]) -> None:
        loss = model.loss_of(given, model(given, training=True))
        torch.autograd.grad(loss, values, materialize_grads=True)

    handles = [value.register_hook(_small) for value in values]
    try:
        return _peak(run, batch, values[0].device)
    finally:
        for handle in handles:
            handle.remove()


def _small(gradient: Tensor) -> Tensor:
    """A gradient without storage.

    In a step, each gradient moves to its permanent buffer as soon as it is computed.
    """
    return gradient.new_empty(()).expand(gradient.shape)


def _peak(run: Callable[[dict[str, Tensor]], object], batch: Batch, device: torch.device) -> int:
    """The peak bytes of tensors that `run` creates."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
        with _Live() as live:
            run(given)
    return int(live.most)


class _Live(TorchDispatchMode):
    """Counts the bytes of all live tensors that are created within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._note, made)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size
