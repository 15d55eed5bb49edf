"""LoRA on attention layers by Keras' `enable_lora`, and the LoRA file for diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
from safetensors.numpy import save_file

from kcv2diffusers.diffusion import Array
from kcv2diffusers.dreambooth.snapshots import Values
from kcv2diffusers.models.layers import Conv2D


def add_lora(model: keras.Model, rank: int, alpha: float, seed: int = 0) -> None:
    """Freeze `model` and add LoRA to the attention projections of its transformer blocks.

    The updates have rank `rank` and are scaled by alpha / rank (Hu et al. 2021, arXiv:2106.09685).
    """
    model.trainable = False
    for number, layer in enumerate(attention_projections(model)):
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


def factors(layer: keras.layers.Dense, value: Values) -> tuple[Array, Array]:
    """The two LoRA factors of a layer: (inputs, rank) and (rank, outputs), float32.

    The scale alpha / rank is multiplied into the second. `value` reads their variables.
    """
    first, second = (np.asarray(value(v), "float32") for v in (layer.lora_kernel_a, layer.lora_kernel_b))
    return first, second * np.float32(layer.lora_alpha / layer.lora_rank)


def write_lora(path: Path, parts: Mapping[str, keras.Model], names: Mapping[int, str], value: Values) -> None:
    """Write the LoRA updates of `parts` (unet, text_encoder) for diffusers' `load_lora_weights`.

    `names` maps the `id` of a kernel to its diffusers name. The scale is multiplied into a factor, so every
    loader applies the same one.
    """
    tensors = {}
    for part, model in parts.items():
        for layer in attention_projections(model):
            module = f"{part}.{names[id(layer._kernel)].removesuffix('.weight')}"
            first, second = factors(layer, value)
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(first.T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(second.T)
    save_file(tensors, path, metadata={"format": "pt"})
