"""LoRA on attention layers and convolutions by Keras' `enable_lora`, and the LoRA file for diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
from safetensors.numpy import save_file

from kcv2diffusers.diffusion import LATENT_CHANNELS, Array
from kcv2diffusers.dreambooth.snapshots import Values
from kcv2diffusers.models.layers import Conv2D
from kcv2diffusers.sources.lora import ADAPTER
from kcv2diffusers.targets.lora import adapter_config


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
        layer.trainable = True
        first = keras.initializers.HeUniform(seed=seed + number)
        layer.enable_lora(rank, lora_alpha=alpha, a_initializer=first)
        layer._kernel.trainable = False
        if layer.bias is not None:
            layer.bias.trainable = False
    model.predict_function = None  # a function compiled before would lack the updates


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
    return [layer for layer in (*attention_projections(model), *convolutions(model)) if layer.lora_enabled]


def factors(layer: keras.layers.Layer, value: Values) -> tuple[Array, Array]:
    """The two LoRA factors of a layer, float32: (..., inputs, rank) as its kernel, and (rank, outputs).

    The scale alpha / rank is multiplied into the second. `value` reads their variables.
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
            if first.ndim == 4:  # a convolution: (rank, inputs, height, width) and (outputs, rank, 1, 1)
                first, second = first.transpose(2, 0, 1, 3), second[None, None]
                tensors[f"{part}.{module}.lora_A.weight"] = np.ascontiguousarray(first.transpose(3, 0, 1, 2))
                tensors[f"{part}.{module}.lora_B.weight"] = np.ascontiguousarray(second.transpose(3, 2, 0, 1))
            else:
                tensors[f"{part}.{module}.lora_A.weight"] = np.ascontiguousarray(first.T)
                tensors[f"{part}.{module}.lora_B.weight"] = np.ascontiguousarray(second.T)
            ranks[part, module] = layer.lora_rank
    metadata = {"format": "pt"}
    if len(set(ranks.values())) > 1:  # not every version of diffusers then takes alpha for the rank
        metadata[ADAPTER] = json.dumps(adapter_config(ranks, ranks), sort_keys=True)
    save_file(tensors, path, metadata=metadata)
