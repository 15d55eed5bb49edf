"""LoRA on layers by Keras' `enable_lora`, new or from a LoRA file, and the LoRA file for diffusers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from safetensors.numpy import save_file

from kcv2diffusers.diffusion import LATENT_CHANNELS, Array
from kcv2diffusers.dreambooth.snapshots import Values
from kcv2diffusers.models.layers import Conv2D, Dense
from kcv2diffusers.sources.lora import Update
from kcv2diffusers.targets.lora import adapter_metadata


def add_lora(
    model: keras.Model,
    rank: int,
    alpha: float,
    seed: int = 0,
    *,
    conv_rank: int = 0,
    conv_alpha: float = 0.0,
) -> None:
    """Freeze `model` and add LoRA to the attention projections of its transformer blocks.

    The updates have rank `rank` and are scaled by alpha / rank (Hu et al. 2021, arXiv:2106.09685). With a
    `conv_rank` convolutions have updates of that rank too, scaled by `conv_alpha` (0: the rank) / rank.
    """
    model.trainable = False
    wanted = [(layer, rank, alpha) for layer in attention_projections(model)]
    if conv_rank:
        wanted += [(layer, conv_rank, conv_alpha or conv_rank) for layer in convolutions(model)]
    for number, (layer, rank, alpha) in enumerate(wanted):
        _enable(layer, rank, alpha, keras.initializers.HeUniform(seed=seed + number))
    model.predict_function = None  # a function compiled before would lack the updates


def load_lora(model: keras.Model, updates: Iterable[Update], names: Mapping[int, str], alpha: float) -> None:
    """Freeze `model` and add the updates of a LoRA file to its layers: linear layers and convolutions.

    `names` maps the `id` of a kernel to its diffusers name. Ranks are those of the file. `alpha` replaces the
    alphas of the file; 0 keeps them. The factors are scaled so that the model computes the same with either.
    """
    model.trainable = False
    kernels = {
        names.get(id(layer._kernel)): layer
        for layer in model._flatten_layers()
        if isinstance(layer, (Dense, Conv2D))
    }
    for update in updates:
        layer = kernels[f"{update.module}.weight"]
        new = alpha or update.alpha or update.rank
        _enable(layer, update.rank, new, "zeros")
        down, up = update.values()
        layer.lora_kernel_a.assign(down.transpose(2, 1, 0).reshape(layer.lora_kernel_a.shape))
        layer.lora_kernel_b.assign(up.T * np.float32(update.alpha / new))
    model.predict_function = None


def _enable(layer: keras.layers.Layer, rank: int, alpha: float, initializer: Any) -> None:
    """Add an update to a layer: its factors can be trained, its kernel and bias are frozen."""
    layer.trainable = True
    layer.enable_lora(rank, lora_alpha=alpha, a_initializer=initializer)
    layer._kernel.trainable = False
    if layer.bias is not None:
        layer.bias.trainable = False


def store_frozen_as_computed(model: keras.Model) -> None:
    """Store the frozen weights of `model` in the compute dtype of its layers, which may have 16 bits.

    Keras casts them to that dtype in every step, so results stay bit-identical. Weights of normalisation
    layers, which Keras does not cast, stay float32. On PyTorch with a GPU, convolution kernels are also
    stored in the memory order that the GPU uses. TensorFlow's variables cannot change their dtype; nothing is
    done there.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return
    for layer in model._flatten_layers():
        if backend == "torch" and isinstance(layer, Conv2D):
            _turn_round(layer._kernel)
        dtype = keras.backend.standardize_dtype(layer.compute_dtype)
        for variable in (*layer._trainable_variables, *layer._non_trainable_variables):
            casts = variable._autocast and keras.backend.is_float_dtype(variable._dtype)
            if variable.trainable or not casts or variable._dtype == dtype:
                continue
            if backend == "torch":  # in place: the PyTorch module of the layer holds the same parameter
                variable._value.data = keras.ops.cast(variable._value.data, dtype)
            else:
                variable._value = keras.ops.cast(variable._value, dtype)
            variable._dtype = dtype


def _turn_round(kernel: keras.Variable) -> None:
    if not kernel.trainable and kernel._value.device.type == "cuda":
        from kcv2diffusers.models.torch_layers import turn_round

        kernel._value.data = turn_round(kernel._value.data)


def attention_projections(model: keras.Model) -> list[keras.layers.Dense]:
    """The query, key, value and output projections of every attention layer in the UNet or text encoder."""
    names = ("to_q", "to_k", "to_v", "out_proj", "q_proj", "k_proj", "v_proj")
    return [
        getattr(layer, name)
        for layer in model._flatten_layers()
        if type(layer).__name__ in ("CrossAttention", "CLIPAttention")
        for name in names
        if hasattr(layer, name)
    ]


def convolutions(model: keras.Model) -> list[Conv2D]:
    """The convolutions of the UNet that may have a LoRA: all but those from and to latents."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, Conv2D) and LATENT_CHANNELS not in tuple(layer._kernel.shape[-2:])
    ]


def lora_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers that have a LoRA."""
    return [layer for layer in model._flatten_layers() if getattr(layer, "lora_enabled", False)]


def factors(layer: keras.layers.Layer, value: Values) -> tuple[Array, Array]:
    """The two LoRA factors of a layer: (..., inputs, rank) and (rank, outputs), float32.

    The first has the height and width of a convolution's kernel in front. The scale alpha / rank is
    multiplied into the second. `value` reads their variables.
    """
    first, second = (np.asarray(value(v), "float32") for v in (layer.lora_kernel_a, layer.lora_kernel_b))
    return first, second * np.float32(layer.lora_alpha / layer.lora_rank)


def write_lora(path: Path, parts: Mapping[str, keras.Model], names: Mapping[int, str], value: Values) -> None:
    """Write the LoRA updates of `parts` (unet, text_encoder) for diffusers' `load_lora_weights`.

    `names` maps the `id` of a kernel to its diffusers name. The scale is multiplied into a factor, so every
    loader applies the same one.
    """
    tensors, ranks = {}, {}
    for part, model in parts.items():
        for layer in lora_layers(model):
            module = names[id(layer._kernel)].removesuffix(".weight")
            first, second = factors(layer, value)
            *kernel, inputs, rank = first.shape
            down = first.reshape(-1, inputs, rank).transpose(2, 1, 0).reshape(rank, inputs, *kernel)
            up = second.T.reshape(-1, rank, *[1] * len(kernel))
            tensors[f"{part}.{module}.lora_A.weight"] = np.ascontiguousarray(down)
            tensors[f"{part}.{module}.lora_B.weight"] = np.ascontiguousarray(up)
            ranks[part, module] = rank
    save_file(tensors, path, metadata={"format": "pt", **adapter_metadata(ranks, ranks)})
