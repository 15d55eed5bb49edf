"""Layers shared by the three networks: padded convolutions, rematerialised blocks, attention, GELU.

Layer classes and attributes have KerasCV's names, because Keras derives the paths inside a `.weights.h5` from
them. These names are what makes the weight files of both interchangeable.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import keras
from keras import ops

Tensor = Any
"""A tensor of the active Keras backend."""

EPSILON = 1e-5
"""Added to the variance in every normalisation; KerasCV uses one value throughout."""


_ZEROS = ContextVar("zeros", default=False)


class Kernel(keras.initializers.GlorotUniform):  # type: ignore[misc]
    """Keras' default kernel initializer, or zeros within `zeros()`."""

    def __call__(self, shape: tuple[int, ...], dtype: str | None = None) -> Tensor:
        return ops.zeros(shape, dtype) if _ZEROS.get() else super().__call__(shape, dtype)


@contextlib.contextmanager
def zeros() -> Iterator[None]:
    """Initialise the kernels of models built in this context with zeros.

    Their weights are loaded next, and random initialisation takes time (on JAX one compilation per shape).
    """
    token = _ZEROS.set(True)
    try:
        yield
    finally:
        _ZEROS.reset(token)


def apply(layer: keras.layers.Layer, inputs: Tensor) -> Tensor:
    """Call `layer` on `inputs` from within another layer of the same dtype policy.

    Keras' own `__call__` takes 0.1 ms, and a UNet makes 681 such calls. Its work (casts, scopes) has already
    been done for the outer layer. It is still needed to build the layer, and for quantised layers.
    """
    if layer.built and layer.quantization_mode is None:
        return layer.call(inputs)
    return layer(inputs)


class Dense(keras.layers.Dense):  # type: ignore[misc]
    """A linear layer.

    A low-rank update (Keras' `enable_lora`) is applied to the inputs. Keras' own call adds the update to the
    kernel instead. It keeps that second kernel for the backward pass and computes the gradient of the whole
    kernel.
    """

    def call(self, inputs: Tensor) -> Tensor:
        if not self.lora_enabled:
            return product(inputs, self.kernel, self.bias)
        update = ops.matmul(ops.matmul(inputs, self.lora_kernel_a), self.lora_kernel_b)
        return product(inputs, self._kernel, self.bias) + self.lora_alpha / self.lora_rank * update


def dense(width: int, use_bias: bool = True) -> Dense:
    """A linear layer."""
    return Dense(width, use_bias=use_bias, kernel_initializer=Kernel())


def product(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """(..., inputs) @ (inputs, outputs) + (outputs,)."""
    kernel = ops.convert_to_tensor(kernel)
    bias = None if bias is None else ops.convert_to_tensor(bias)
    if keras.backend.backend() == "torch":
        from kcv2diffusers.models import torch_product

        return torch_product.product(x, kernel, bias)
    x = ops.matmul(x, kernel)
    return x if bias is None else x + bias


class Conv2D(keras.layers.Conv2D):  # type: ignore[misc]
    """A convolution. On a CPU it is one matrix product if the kernel is 1x1 or larger than the feature map.

    Keras' kernels are (height, width, inputs, outputs). PyTorch and XLA transpose them in every pass, which
    takes most of the time of the coarser half of a UNet.

    A low-rank update (Keras' `enable_lora`) is a second convolution, with `rank` outputs, and a 1x1
    convolution after it. Keras' own call adds the update to the kernel instead.
    """

    def call(self, inputs: Tensor) -> Tensor:
        return self._updated(inputs, self._convolve)

    def on_torch_gpu(self, inputs: Tensor, pixels: int) -> Tensor:
        """The convolution by PyTorch on a GPU, with `pixels` zeros of padding on each side."""
        return self._updated(inputs, partial(self._by_torch, pixels=pixels))

    def _updated(self, inputs: Tensor, convolve: Callable[..., Tensor]) -> Tensor:
        """`convolve` with the kernel and the bias, plus the low-rank update if there is one."""
        outputs = convolve(inputs, self._kernel, self.bias)
        if not self.lora_enabled:
            return outputs
        update = ops.matmul(convolve(inputs, self.lora_kernel_a, None), self.lora_kernel_b)
        return outputs + self.lora_alpha / self.lora_rank * update

    def _convolve(self, inputs: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        # A convolution padded on one side only has a large input anyway.
        symmetric = self.padding == "valid" or self.strides == (1, 1)
        if symmetric and _on_torch_gpu(inputs):
            if self.kernel_size == self.strides == (1, 1):
                return self._as_product(inputs, kernel, bias)
            pixels = self.kernel_size[0] // 2 if self.padding == "same" else 0
            return self._by_torch(inputs, kernel, bias, pixels)
        known = all(isinstance(length, int) for length in inputs.shape)  # False while a model is built
        if symmetric and known and _turns_kernels(inputs):
            pixels = math.prod(inputs.shape[:3]) // math.prod(self.strides)
            if self.kernel_size == (1, 1) or pixels <= 2 * kernel.shape[-1]:
                return self._as_product(inputs, kernel, bias)
        outputs = self.convolution_op(inputs, kernel)
        return outputs if bias is None else ops.add(outputs, bias)

    def _by_torch(self, inputs: Tensor, kernel: Tensor, bias: Tensor | None, pixels: int) -> Tensor:
        from kcv2diffusers.models import torch_layers

        bias = None if bias is None else ops.convert_to_tensor(bias)
        # Pass the kernel as stored: converted, it would already be a copy, cast to the compute dtype.
        return torch_layers.convolve(inputs, kernel._value, bias, self.strides[0], pixels)

    def _as_product(self, inputs: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        size, step = self.kernel_size[0], self.strides[0]
        if self.padding == "same" and size > 1:
            inputs = ops.pad(inputs, ((0, 0), *((size // 2, size // 2),) * 2, (0, 0)))
        rows, columns = (length - size + 1 for length in inputs.shape[1:3])
        shifted = [
            inputs[:, i : rows + i : step, j : columns + j : step] for i in range(size) for j in range(size)
        ]
        x = ops.concatenate(shifted, -1) if size > 1 else inputs
        return product(x, ops.reshape(kernel, (-1, kernel.shape[-1])), bias)


def _on_torch_gpu(inputs: Tensor) -> bool:
    return keras.backend.backend() == "torch" and inputs.device.type not in ("cpu", "meta")


def _turns_kernels(inputs: Tensor) -> bool:
    """Whether convolutions of `inputs` run on a CPU in PyTorch or XLA, both of which transpose the kernel."""
    if keras.backend.backend() == "torch":
        return bool(inputs.device.type == "cpu")
    return _on_jax_cpu()


def _on_jax_cpu() -> bool:
    if keras.backend.backend() != "jax":
        return False
    import jax

    return bool(jax.default_backend() == "cpu")


class Composite(keras.layers.Layer):  # type: ignore[misc]
    """A layer of layers, which are built when it is called first."""

    def build(self, input_shape: Any) -> None:
        """Do nothing: Keras' own method calls the layer an additional time to build what is inside."""


class PaddedConv2D(Composite):
    """A 2D convolution of (batch, height, width, channels).

    The output is (batch, height / strides, width / strides, filters). With `strides=2` the padding is one
    pixel on every side (the UNet) or, if `pad_end`, one pixel at the bottom and right only (the VAE encoder).
    Otherwise Keras' own "same" padding is used, which saves a copy of the input.
    """

    def __init__(
        self, filters: int, kernel_size: int, strides: int = 1, pad_end: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        pad_here = strides == 2 and not pad_end
        self.padding2d = keras.layers.ZeroPadding2D(1) if pad_here else None
        self.conv2d = Conv2D(
            filters,
            kernel_size,
            strides=strides,
            padding="valid" if pad_here else "same",
            kernel_initializer=Kernel(),
        )

    def call(self, inputs: Tensor) -> Tensor:
        if self.padding2d is not None:
            if _on_torch_gpu(inputs) and self.conv2d.built:
                return self.conv2d.on_torch_gpu(inputs, 1)  # pads without a copy
            inputs = apply(self.padding2d, inputs)
        return apply(self.conv2d, inputs)


class Block(Composite):
    """A layer that can recompute its activations in the backward pass (see `rematerialise`).

    Subclasses define `compute`. Inputs are one tensor or, as in KerasCV, a list of tensors. The output has
    the shape of the first one, with `width` channels if that is set.
    """

    remat = False
    width: int | None = None

    def build(self, input_shape: Any) -> None:
        """Build the layers inside with one symbolic call, for which unknown sizes are made up.

        Keras makes four of them, with other sizes and for the shape of the output. They take most of the time
        in which a model is built.
        """
        several = isinstance(input_shape[0], (list, tuple))
        shapes = input_shape if several else [input_shape]
        made_up = [[8 if size is None else size for size in shape] for shape in shapes]
        tensors = [keras.KerasTensor(shape, self.compute_dtype) for shape in made_up]
        super().compute_output_spec(tensors if several else tensors[0])

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        """The output's shape and dtype, without a symbolic call."""
        first = inputs[0] if isinstance(inputs, (list, tuple)) else inputs
        return keras.KerasTensor((*first.shape[:-1], self.width or first.shape[-1]), self.compute_dtype)

    def call(self, inputs: Tensor) -> Tensor:
        tensors = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        return (keras.remat(self.compute) if self.remat else self.compute)(*tensors)

    def compute(self, *tensors: Tensor) -> Tensor:
        raise NotImplementedError


def rematerialise(model: keras.Model, enabled: bool = True) -> None:
    """Trade time for memory: keep only the inputs of each block of `model` for the backward pass.

    This is a switch on a built model and not an argument of its builder, because variables must not be
    created inside a rematerialised call.
    """
    for layer in model.layers:
        if isinstance(layer, Block):
            layer.remat = enabled


class GroupNormalization(keras.layers.GroupNormalization):  # type: ignore[misc]
    """Group normalisation of (batch, height, width, channels) with float32 statistics.

    The statistics are float32 under every dtype policy. Keras' own call makes half a dozen copies of its
    input and keeps all of them for the backward pass; they take most of a VAE's memory. This one calls
    PyTorch's fused kernel. On other backends it folds the statistics and the affine parameters into one
    multiply-add per channel.
    """

    def call(self, inputs: Tensor) -> Tensor:
        if keras.backend.backend() == "torch":
            from kcv2diffusers.models import torch_layers

            affine = self.gamma.value, self.beta.value
            return torch_layers.group_norm(inputs, self.groups, *affine, self.epsilon, self.compute_dtype)
        batch, channels = ops.shape(inputs)[0], inputs.shape[-1]
        x = ops.cast(inputs, "float32")
        grouped = ops.reshape(x, (-1, *ops.shape(inputs)[1:3], self.groups, channels // self.groups))
        mean, variance = ops.moments(grouped, axes=(1, 2, 4), keepdims=True)
        gamma = ops.reshape(ops.cast(self.gamma, "float32"), (1, 1, 1, self.groups, -1))
        beta = ops.reshape(ops.cast(self.beta, "float32"), (1, 1, 1, self.groups, -1))
        scale = gamma * ops.rsqrt(variance + self.epsilon)
        shift = beta - mean * scale
        x = x * ops.reshape(scale, (batch, 1, 1, channels)) + ops.reshape(shift, (batch, 1, 1, channels))
        return ops.cast(x, self.compute_dtype)


def group_norm(groups: int) -> keras.layers.Layer:
    """Group normalisation with KerasCV's epsilon."""
    return GroupNormalization(groups, epsilon=EPSILON)


class UpSampling2D(keras.layers.UpSampling2D):  # type: ignore[misc]
    """Nearest-neighbour upsampling by 2 of (batch, height, width, channels), in one copy.

    Keras' own call cannot be traced on PyTorch's meta device. Building a model would then compute on real,
    large tensors.
    """

    def call(self, inputs: Tensor) -> Tensor:
        batch, height, width, channels = ops.shape(inputs)
        x = ops.reshape(inputs, (-1, height, 1, width, 1, channels))
        x = ops.broadcast_to(x, (batch, height, 2, width, 2, channels))
        return ops.reshape(x, (-1, 2 * height, 2 * width, channels))


def layer_norm() -> keras.layers.Layer:
    """Layer normalisation with KerasCV's epsilon; Keras always computes its statistics in float32."""
    return keras.layers.LayerNormalization(epsilon=EPSILON)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head attention of (batch, length, width) tensors; returns (batch, query length, width).

    Uses flash attention where the backend has it. The softmax is computed in float32 under every dtype
    policy.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        from kcv2diffusers.models import torch_layers

        return torch_layers.attention(query, key, value, heads, causal)

    def split(x: Tensor) -> Tensor:
        return ops.reshape(x, (-1, ops.shape(x)[1], heads, x.shape[-1] // heads))

    q, k, v = split(query), split(key), split(value)
    if backend == "jax":
        from kcv2diffusers.models import jax_layers

        mixed = jax_layers.attention(q, k, v, causal)
    else:  # on TensorFlow, scores are recomputed in the backward pass
        mixed = keras.remat(partial(ops.dot_product_attention, is_causal=causal))(q, k, v)
    return ops.reshape(mixed, (-1, ops.shape(query)[1], query.shape[-1]))


def to_sequence(x: Tensor) -> Tensor:
    """(batch, height, width, channels) to (batch, height * width, channels)."""
    _, height, width, _ = ops.shape(x)
    return ops.reshape(x, (-1, height * width, x.shape[-1]))


def to_image(sequence: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_sequence`, with the height and width of `like`."""
    _, height, width, _ = ops.shape(like)
    return ops.reshape(sequence, (-1, height, width, sequence.shape[-1]))


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's sigmoid approximation of the GELU, as in SD1's text encoder."""
    return x * ops.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "tanh": lambda x: ops.gelu(x, approximate=True),
    "exact": lambda x: ops.gelu(x, approximate=False),
}


@contextlib.contextmanager
def dtype_policy(policy: str | None) -> Iterator[None]:
    """Build layers under `policy` (such as "mixed_bfloat16"); None leaves the global policy unchanged."""
    before = keras.config.dtype_policy()
    if policy is not None:
        keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
