"""Layers on PyTorch by its own fused operations, without the copies that Keras' calls of them make."""

from __future__ import annotations

import torch
from torch.nn import functional

Tensor = torch.Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool) -> Tensor:
    """`layers.attention` by PyTorch's choice of fused kernel."""
    width = query.shape[-1]
    q, k, v = (
        x.reshape(x.shape[0], x.shape[1], heads, width // heads).transpose(1, 2) for x in (query, key, value)
    )
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return mixed.transpose(1, 2).reshape(query.shape)


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """A convolution of (batch, height, width, channels) with Keras' (height, width, inputs, outputs) kernel.

    Permuted views are PyTorch's channels-last format, in which a GPU convolves without turning the pictures
    round.
    """
    turned = kernel.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    x = functional.conv2d(x.permute(0, 3, 1, 2), turned, bias, stride, padding)
    return x.permute(0, 2, 3, 1)


def group_norm(x: Tensor, groups: int, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    """Group normalisation of (batch, height, width, channels) with float32 statistics.

    On a CPU a permuted view, channels-last, is what the fused kernel takes without a copy.
    """
    x = functional.group_norm(x.permute(0, 3, 1, 2).float(), groups, gamma.float(), beta.float(), epsilon)
    return x.permute(0, 2, 3, 1)
