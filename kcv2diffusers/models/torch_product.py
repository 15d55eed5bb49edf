"""Matrix products on PyTorch, by oneDNN on AMD processors with AVX-512.

PyTorch calls MKL for float32 products. MKL does not use AVX-512 on AMD processors and reaches half of their
throughput. oneDNN, which PyTorch uses for convolutions, does use it. On Intel processors a step takes 5 %
longer with oneDNN. The operation called here is the one that TorchInductor puts into compiled models
(torch/_inductor/fx_passes/mkldnn_fusion.py); it has no gradient.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Tensor = torch.Tensor


def product(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """(..., inputs) @ (inputs, outputs) + (outputs,)."""
    given = [tensor for tensor in (x, kernel, bias) if tensor is not None]
    if all(t.device.type == "cpu" and t.dtype == torch.float32 for t in given) and prefers_onednn():
        by_onednn: Tensor = _Product.apply(x.contiguous(), kernel.contiguous(), bias)  # type: ignore[no-untyped-call]
        return by_onednn
    result = x @ kernel
    return result if bias is None else result + bias


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN's matrix product is available and faster than MKL's."""
    with suppress(OSError):
        if "GenuineIntel" in Path("/proc/cpuinfo").read_text():
            return False
    return has_onednn()


@cache
def has_onednn() -> bool:
    """Whether oneDNN's matrix product is available and uses AVX-512; it is not a public operation."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return _multiply(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)).shape == (2, 4)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _multiply(x: Tensor, turned: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ turned.T + bias; each of the two matrices is contiguous or transposed."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, turned, bias, "none", [], "")
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        for_x, for_kernel, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_kernel else None, kernel if for_x else None)
        return _multiply(x, kernel.T, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, kernel = ctx.saved_tensors
        for_x, for_kernel, for_bias = ctx.needs_input_grad
        # oneDNN is slow on a slice of a larger tensor, such as the gradient of a concatenation.
        gradient = gradient.contiguous()
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            _multiply(gradient, kernel) if for_x else None,
            _multiply(x.reshape(-1, x.shape[-1]).T, rows.T) if for_kernel else None,
            rows.sum(0) if for_bias else None,
        )
