"""Layers on PyTorch by its own fused operations, without the copies that Keras makes around them."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

Tensor = torch.Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool) -> Tensor:
    """`layers.attention` by the fused kernel that PyTorch selects."""
    width = query.shape[-1]
    q, k, v = (
        x.reshape(x.shape[0], x.shape[1], heads, width // heads).transpose(1, 2) for x in (query, key, value)
    )
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return mixed.transpose(1, 2).reshape(query.shape)


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """A convolution of (batch, height, width, channels) with Keras' (height, width, inputs, outputs) kernel.

    Permuted views are PyTorch's channels-last memory format, in which a GPU convolves without transposing the
    images. The kernel, of any dtype, is cast and transposed in one copy. No copy is made of a kernel that is
    the output of `turn_round` and has the dtype of `x`.
    """
    turned = kernel.permute(3, 2, 0, 1).to(x.dtype, memory_format=torch.channels_last)
    x = functional.conv2d(x.permute(0, 3, 1, 2), turned, bias, stride, padding)
    return x.permute(0, 2, 3, 1)


def turn_round(kernel: Tensor) -> Tensor:
    """Keras' kernel with the same shape and values, stored in the memory order in which a GPU convolves."""
    return kernel.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def group_norm(x: Tensor, groups: int, gamma: Tensor, beta: Tensor, epsilon: float, dtype: str) -> Tensor:
    """Group normalisation of (batch, height, width, channels) with float32 statistics, returned as `dtype`.

    PyTorch's fused kernel accepts a permuted (channels-last) view without a copy on a CPU only. On a GPU it
    needs the pixels of each channel contiguous. The conversion there and the conversion back are one copy
    each, which also casts.
    """
    computed = getattr(torch, dtype)
    norm = _on_cpu if x.device.type == "cpu" else _on_gpu
    x = norm(x.permute(0, 3, 1, 2), groups, gamma.float(), beta.float(), epsilon, computed)
    return x.permute(0, 2, 3, 1)


def _on_cpu(
    x: Tensor, groups: int, gamma: Tensor, beta: Tensor, epsilon: float, computed: torch.dtype
) -> Tensor:
    return functional.group_norm(x.float(), groups, gamma, beta, epsilon).to(computed)


def _on_gpu(
    x: Tensor, groups: int, gamma: Tensor, beta: Tensor, epsilon: float, computed: torch.dtype
) -> Tensor:
    x = _Turned.apply(x, torch.float32, torch.contiguous_format)  # type: ignore[no-untyped-call]
    x = functional.group_norm(x, groups, gamma, beta, epsilon)
    turned: Tensor = _Turned.apply(x, computed, torch.channels_last)  # type: ignore[no-untyped-call]
    return turned


class _Turned(torch.autograd.Function):
    """Cast and change the memory format in one copy; the backward pass also makes one copy.

    PyTorch's own operation leaves the gradient in the new memory format. A convolution would then have to
    transpose it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, order: torch.memory_format) -> Tensor:
        turned = order == torch.channels_last
        ctx.back = x.dtype, torch.contiguous_format if turned else torch.channels_last
        return x.to(dtype, memory_format=order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        dtype, order = ctx.back
        return gradient.to(dtype, memory_format=order), None, None
