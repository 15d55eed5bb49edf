"""Low-rank updates of attention layers by Keras' `enable_lora`, and the file of them for diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
from safetensors.numpy import save_file


def add_lora(model: keras.Model, rank: int, alpha: float, seed: int = 0) -> None:
    """Freeze `model` and give the attention projections of its transformer blocks low-rank updates of `rank`,
    scaled by alpha / rank (Hu et al. 2021, arXiv:2106.09685).
    """
    model.trainable = False
    for number, layer in enumerate(attention_projections(model)):
        layer.trainable = True
        first = keras.initializers.HeUniform(seed=seed + number)
        layer.enable_lora(rank, lora_alpha=alpha, a_initializer=first)
        layer._kernel.trainable = False
        if layer.bias is not None:
            layer.bias.trainable = False
    model.predict_function = None  # one that was compiled before would not have the updates


def attention_projections(model: keras.Model) -> list[keras.layers.Dense]:
    """The query, key, value and output layers of all attention in the UNet or text encoder."""
    names = ("to_q", "to_k", "to_v", "out_proj", "q_proj", "k_proj", "v_proj")
    return [
        getattr(layer, name)
        for layer in model._flatten_layers()
        if type(layer).__name__ in ("CrossAttention", "CLIPAttention")
        for name in names
        if hasattr(layer, name)
    ]


def write_lora(path: Path, parts: Mapping[str, keras.Model], names: Mapping[int, str]) -> None:
    """Write the updates of `parts` (unet, text_encoder) for diffusers' `load_lora_weights`.

    `names` are what diffusers calls the kernels, by `id`. The scale alpha / rank is multiplied into the
    second factor, so that every loader applies the same.
    """
    tensors = {}
    for part, model in parts.items():
        for layer in attention_projections(model):
            module = f"{part}.{names[id(layer._kernel)].removesuffix('.weight')}"
            first, second = (
                np.asarray(keras.ops.convert_to_numpy(factor), dtype="float32")
                for factor in (layer.lora_kernel_a, layer.lora_kernel_b)
            )
            scale = np.float32(layer.lora_alpha / layer.lora_rank)
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(first.T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(second.T * scale)
    save_file(tensors, path, metadata={"format": "pt"})
