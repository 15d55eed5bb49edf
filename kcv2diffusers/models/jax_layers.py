"""Attention on JAX: cuDNN's fused kernel if available, else scores recomputed in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from keras import backend, ops

Tensor = Any

FUSED, TWICE = "cuDNN's fused kernel", "scores computed twice"
_chosen: dict[str, dict[str, None]] = {FUSED: {}, TWICE: {}}  # shapes by method, in order of first use


def forget() -> None:
    """Clear what `chosen` reports, because Keras builds models with placeholder lengths."""
    for what in _chosen.values():
        what.clear()


def chosen() -> str:
    """Report how attention is computed on a GPU or TPU, for every shape traced so far; empty on a CPU."""
    parts = [f"{way} ({', '.join(what)})" for way, what in _chosen.items() if what]
    return f"Attention: {'; '.join(parts)}." if parts else ""


def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention of (batch, length, heads, width) tensors.

    The (heads, query length, key length) scores are not kept for the backward pass. At 512 pixels they take
    half a gigabyte in each of the five finest layers of a UNet.
    """
    device = jax.devices()[0]
    fused = has_kernel(query, key, device)
    if device.platform != "cpu":
        what = f"{query.shape[1]} on {key.shape[1]} of width {query.shape[-1]} in {query.dtype}"
        _chosen[FUSED if fused else TWICE][what] = None
    if fused:
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="cudnn")
    attend = partial(ops.dot_product_attention, is_causal=causal, flash_attention=False)
    if device.platform == "cpu":
        return _after_the_gradient(attend)(query, key, value)
    return jax.checkpoint(attend)(query, key, value)


def has_kernel(query: Tensor, key: Tensor, device: Any) -> bool:
    """Whether cuDNN has a fused kernel for both the forward and the backward pass on `device`.

    Keras checks the forward pass only. JAX then raises in the backward pass of an odd length, and Keras logs
    the error for each layer (seen with JAX 0.11 at SD1's 77 tokens).
    """
    return bool(
        "cuda" in str(device.client.platform_version)
        and float(device.compute_capability) >= 8.0
        and backend.standardize_dtype(query.dtype) in ("bfloat16", "float16")
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 128
        and query.shape[1] % 2 == key.shape[1] % 2 == 0
    )


def _after_the_gradient(attend: Any) -> Any:
    """`attend`, with scores recomputed only once the incoming gradient is available.

    On a CPU, XLA schedules any operation whose inputs are ready. With `jax.checkpoint` it would recompute the
    scores of all layers early and hold them all in memory.
    """

    @jax.custom_gradient  # type: ignore[untyped-decorator]
    def attending(query: Tensor, key: Tensor, value: Tensor) -> Any:
        def backward(gradient: Tensor) -> Any:
            return jax.vjp(attend, query + 0 * gradient, key, value)[1](gradient)

        return attend(query, key, value), backward

    return attending
