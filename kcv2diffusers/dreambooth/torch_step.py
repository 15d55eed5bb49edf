"""A training step on PyTorch: on a GPU recorded once per batch shape as a CUDA graph, then replayed.

Keras dispatches each operation anew in every call. On a GPU that takes longer than the computation. On an
H200 a step of SD1's UNet at 512 pixels took 278 ms, and 47 ms as a CUDA graph, which launches the same
kernels by one call (benchmarks/gpu.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch

from kcv2diffusers.dreambooth import torch_updates

Tensor = torch.Tensor
Batch = dict[str, Tensor]

_ALIGNED = 4  # numbers: PyTorch's fused kernels are faster on gradients at multiples of 16 bytes


class TorchStep:
    """Training steps of a compiled `DreamBooth`.

    Nothing in a step waits for the device or copies to it, except for the batch.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.variables = model.trainable_variables
        self.device = self.variables[0].value.device
        self.recorded: dict[Any, _Recorded] = {}
        self.pool: Any = None  # the memory pool that all recordings share
        self.gradients: list[Tensor] = []  # the buffers that all recordings write to
        self.sums: Tensor | None = None  # with several processes: the memory of all gradients and the loss
        if model.group.count > 1:
            self._join()

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Train on `batch`, named arrays or tensors on the host; returns its loss, a scalar on the device."""
        given = {name: torch.as_tensor(value) for name, value in batch.items()}
        if recording := self._recording(given):
            loss, gradients = recording(given), self.gradients
        elif self.sums is not None:
            on_device = {name: value.to(self.device) for name, value in given.items()}
            loss, gradients = self.into_gradients(on_device), self.gradients
        else:
            loss, gradients = self._compute({name: value.to(self.device) for name, value in given.items()})
        if self.sums is not None:
            loss = self._summed(loss)
        torch_updates.update(self.model.optimizer, gradients, self.variables)
        return loss

    def _join(self) -> None:
        """Take the weights and the optimizer's state of rank 0, and lay the gradients out in one tensor."""
        for variable in (*self.model.variables, *self.model.optimizer.variables):
            torch.distributed.broadcast(variable.value.data, 0)
        ends = list(accumulate(-(-v.value.numel() // _ALIGNED) * _ALIGNED for v in self.variables))
        self.sums = torch.zeros(ends[-1] + 1, device=self.device)
        self.gradients = [
            self.sums[start:][: variable.value.numel()].view(variable.value.shape)
            for variable, start in zip(self.variables, [0, *ends], strict=False)
        ]

    def _summed(self, loss: Tensor) -> Tensor:
        """Sum the gradients over the processes, in place, and return the sum of the loss."""
        assert self.sums is not None
        self.sums[-1] = loss
        torch.distributed.all_reduce(self.sums)
        return self.sums[-1].clone()

    def _compute(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradients of the scaled loss."""
        loss = self.model.loss_of(batch, self.model(batch, training=True))
        scaled = self.model.optimizer.scale_loss(loss)
        values = [variable.value for variable in self.variables]
        gradients = torch.autograd.grad(scaled, values, materialize_grads=True)
        # PyTorch's fused AdamW kernel assumes contiguous gradients.
        return loss.detach(), [gradient.contiguous() for gradient in gradients]

    def _recording(self, batch: Batch) -> _Recorded | None:
        """The recorded step for a batch of these shapes; None if steps are not recorded."""
        if self.device.type != "cuda" or not self.model.record_steps:
            return None
        key = tuple((name, tuple(value.shape)) for name, value in batch.items())
        if key not in self.recorded:
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            if not self.gradients:
                self.gradients = [torch.empty_like(variable.value) for variable in self.variables]
            try:
                self.recorded[key] = _Recorded(self, batch)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(f"training steps are not recorded, and slower: {error}", stacklevel=2)
                self.model.record_steps = False
                self.recorded.clear()
                if self.sums is None:
                    self.gradients.clear()
        return self.recorded.get(key)

    def into_gradients(self, batch: Batch) -> Tensor:
        """`_compute`, but with gradients written to their permanent buffers.

        Each is moved as soon as it is computed, so there are never two copies of all gradients.
        """
        with _moved([variable.value for variable in self.variables], self.gradients):
            loss = self.model.loss_of(batch, self.model(batch, training=True))
            self.model.optimizer.scale_loss(loss).backward()
        detached: Tensor = loss.detach()
        return detached


class _Recorded:
    """The forward and backward pass for one batch shape as a CUDA graph."""

    def __init__(self, step: TorchStep, batch: Batch) -> None:
        self.batch = {name: value.to(step.device) for name, value in batch.items()}
        # Warm up outside the recording first, so that libraries select and load their kernels. PyTorch
        # requires a separate stream for this.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                loss = step.into_gradients(self.batch)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=step.pool):
            self.loss = step.into_gradients(self.batch)
        self.graph.replay()
        if not torch.allclose(self.loss, loss, rtol=0.02):
            raise RuntimeError(f"a recorded step gave the loss {self.loss.item()}, not {loss.item()}")

    def __call__(self, batch: Batch) -> Tensor:
        for name, value in batch.items():
            # Pinned, because a copy from pageable memory waits for all work queued on the device.
            self.batch[name].copy_(value.pin_memory(), non_blocking=True)
        self.graph.replay()
        return self.loss.clone()


@contextmanager
def _moved(parameters: list[Tensor], targets: list[Tensor]) -> Iterator[None]:
    """Within this block, move each gradient of `parameters` to its target as soon as it is computed."""

    def move(target: Tensor) -> Any:
        def moved(parameter: Tensor) -> None:
            assert parameter.grad is not None
            with torch.no_grad():
                target.copy_(parameter.grad)
            parameter.grad = None

        return moved

    handles = [
        parameter.register_post_accumulate_grad_hook(move(target))  # type: ignore[no-untyped-call]
        for parameter, target in zip(parameters, targets, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
