"""The diffusers state dict of a live KerasCV model, written out by hand from its Python attributes.

An independent statement of what the weight maps say: it walks the objects, not their names or files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np


def dense(name: str, layer: Any) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{name}.weight", np.asarray(layer.kernel).T
    if layer.use_bias:
        yield f"{name}.bias", np.asarray(layer.bias)


def conv(name: str, padded: Any) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{name}.weight", np.moveaxis(np.asarray(padded.conv2d.kernel), (3, 2, 0, 1), (0, 1, 2, 3))
    yield f"{name}.bias", np.asarray(padded.conv2d.bias)


def conv_as_linear(name: str, padded: Any) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{name}.weight", np.asarray(padded.conv2d.kernel)[0, 0].T
    yield f"{name}.bias", np.asarray(padded.conv2d.bias)


def norm(name: str, layer: Any) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{name}.weight", np.asarray(layer.gamma)
    yield f"{name}.bias", np.asarray(layer.beta)


def _created(model: Any, cls: str) -> list[Any]:
    """The model's own layers of a class in the order the constructor made them."""
    layers = [layer for layer in model.layers if type(layer).__name__ == cls]
    return sorted(layers, key=lambda layer: int((re.findall(r"_(\d+)$", layer.name) or [0])[0]))


def _unet(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name, layer in zip(("linear_1", "linear_2"), _created(model, "Dense"), strict=True):
        yield from dense(f"time_embedding.{name}", layer)
    convs = _created(model, "PaddedConv2D")
    names = ["conv_in", *(f"down_blocks.{i}.downsamplers.0.conv" for i in range(3)), "conv_out"]
    for name, layer in zip(names, convs, strict=True):
        yield from conv(name, layer)
    (last,) = _created(model, "GroupNormalization")
    yield from norm("conv_norm_out", last)
    for index, layer in enumerate(_created(model, "Upsample")):
        yield from conv(f"up_blocks.{index}.upsamplers.0.conv", layer.conv)

    down = [f"down_blocks.{i}.resnets.{j}" for i in range(4) for j in range(2)]
    up = [f"up_blocks.{i}.resnets.{j}" for i in range(4) for j in range(3)]
    names = [*down, "mid_block.resnets.0", "mid_block.resnets.1", *up]
    for name, block in zip(names, _created(model, "ResBlock"), strict=True):
        yield from norm(f"{name}.norm1", block.entry_flow[0])
        yield from conv(f"{name}.conv1", block.entry_flow[2])
        yield from dense(f"{name}.time_emb_proj", block.embedding_flow[1])
        yield from norm(f"{name}.norm2", block.exit_flow[0])
        yield from conv(f"{name}.conv2", block.exit_flow[2])
        if hasattr(block.residual_projection, "conv2d"):
            yield from conv(f"{name}.conv_shortcut", block.residual_projection)

    down = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
    up = [f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)]
    names = [*down, "mid_block.attentions.0", *up]
    for name, block in zip(names, _created(model, "SpatialTransformer"), strict=True):
        project = conv if hasattr(block.proj1, "conv2d") else dense
        inner, t = f"{name}.transformer_blocks.0", block.transformer_block
        yield from norm(f"{name}.norm", block.norm)
        yield from project(f"{name}.proj_in", block.proj1)
        yield from project(f"{name}.proj_out", block.proj2)
        for number in (1, 2, 3):
            yield from norm(f"{inner}.norm{number}", getattr(t, f"norm{number}"))
        for number in (1, 2):
            attention = getattr(t, f"attn{number}")
            for part in "qkv":
                yield from dense(f"{inner}.attn{number}.to_{part}", getattr(attention, f"to_{part}"))
            yield from dense(f"{inner}.attn{number}.to_out.0", attention.out_proj)
        yield from dense(f"{inner}.ff.net.0.proj", t.geglu.dense)
        yield from dense(f"{inner}.ff.net.2", t.dense)


def _text_encoder(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    (embedding,) = _created(model, "CLIPEmbedding")
    for kind in ("token", "position"):
        values = np.asarray(getattr(embedding, f"{kind}_embedding").embeddings)
        yield f"text_model.embeddings.{kind}_embedding.weight", values
    for index, layer in enumerate(_created(model, "CLIPEncoderLayer")):
        name = f"text_model.encoder.layers.{index}"
        yield from norm(f"{name}.layer_norm1", layer.layer_norm1)
        yield from norm(f"{name}.layer_norm2", layer.layer_norm2)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from dense(f"{name}.self_attn.{part}", getattr(layer.clip_attn, part))
        yield from dense(f"{name}.mlp.fc1", layer.fc1)
        yield from dense(f"{name}.mlp.fc2", layer.fc2)
    (last,) = _created(model, "LayerNormalization")
    yield from norm("text_model.final_layer_norm", last)


def _resnet(name: str, block: Any) -> Iterator[tuple[str, np.ndarray]]:
    yield from norm(f"{name}.norm1", block.norm1)
    yield from conv(f"{name}.conv1", block.conv1)
    yield from norm(f"{name}.norm2", block.norm2)
    yield from conv(f"{name}.conv2", block.conv2)
    if hasattr(block.residual_projection, "conv2d"):
        yield from conv(f"{name}.conv_shortcut", block.residual_projection)


def _vae_attention(name: str, block: Any) -> Iterator[tuple[str, np.ndarray]]:
    yield from norm(f"{name}.group_norm", block.norm)
    for attribute, part in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        yield from conv_as_linear(f"{name}.{part}", getattr(block, attribute))


def _vae(model: Any, half: str, convs: list[str], resnets: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    for name, layer in zip(convs, _created(model, "PaddedConv2D"), strict=True):
        yield from conv(name, layer)
    for name, block in zip(resnets, _created(model, "ResnetBlock"), strict=True):
        yield from _resnet(name, block)
    (attention,) = _created(model, "AttentionBlock")
    yield from _vae_attention(f"{half}.mid_block.attentions.0", attention)
    (last,) = _created(model, "GroupNormalization")
    yield from norm(f"{half}.conv_norm_out", last)


def _vae_encoder(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    down = [f"encoder.down_blocks.{i}.downsamplers.0.conv" for i in range(3)]
    blocks = [f"encoder.down_blocks.{i}.resnets.{j}" for i in range(4) for j in range(2)]
    yield from _vae(
        model,
        "encoder",
        ["encoder.conv_in", *down, "encoder.conv_out", "quant_conv"],
        [*blocks, "encoder.mid_block.resnets.0", "encoder.mid_block.resnets.1"],
    )


def _vae_decoder(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    up = [f"decoder.up_blocks.{i}.upsamplers.0.conv" for i in range(3)]
    blocks = [f"decoder.up_blocks.{i}.resnets.{j}" for i in range(4) for j in range(3)]
    yield from _vae(
        model,
        "decoder",
        ["post_quant_conv", "decoder.conv_in", *up, "decoder.conv_out"],
        ["decoder.mid_block.resnets.0", "decoder.mid_block.resnets.1", *blocks],
    )


_WALKS = {
    "unet": _unet,
    "text_encoder": _text_encoder,
    "vae_encoder": _vae_encoder,
    "vae_decoder": _vae_decoder,
}


def state_dict(part: str, model: Any) -> dict[str, np.ndarray]:
    """Every tensor that diffusers has for this part, from the model's variables."""
    return {name: np.ascontiguousarray(value) for name, value in _WALKS[part](model)}


def digests(part: str, model: Any) -> dict[str, list[Any]]:
    """Shape and SHA-256 of each tensor's bytes, to compare without keeping gigabytes."""
    return {
        name: [list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
        for name, value in state_dict(part, model).items()
    }
