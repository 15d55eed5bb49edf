"""The diffusers state dicts of live KerasHub models, written out by hand from their Python attributes.

An independent statement of what the weight maps say: it walks the objects, not their names or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

Tensors = Iterator[tuple[str, np.ndarray]]


def _array(variable: Any) -> np.ndarray:
    """A variable, or a kernel with its LoRA added."""
    return keras.ops.convert_to_numpy(getattr(variable, "value", variable))


def dense(name: str, layer: Any, rows: slice = slice(None)) -> Tensors:
    """A Dense layer, or the outputs `rows` of a fused one."""
    yield f"{name}.weight", _array(layer.kernel).T[rows]
    if layer.bias is not None:
        yield f"{name}.bias", _array(layer.bias)[rows]


def split(names: list[str], layer: Any) -> Tensors:
    """Several linear layers of equal size, side by side in one Dense layer."""
    width = layer.kernel.shape[1] // len(names)
    for number, name in enumerate(names):
        yield from dense(name, layer, slice(number * width, (number + 1) * width))


def swapped(name: str, layer: Any) -> Tensors:
    """[shift, scale] becomes [scale, shift]."""
    for key, value in dense(name, layer):
        half = len(value) // 2
        yield key, np.concatenate([value[half:], value[:half]])


def conv(name: str, layer: Any) -> Tensors:
    yield f"{name}.weight", np.moveaxis(_array(layer.kernel), (3, 2, 0, 1), (0, 1, 2, 3))
    yield f"{name}.bias", _array(layer.bias)


def conv_as_linear(name: str, layer: Any) -> Tensors:
    yield f"{name}.weight", _array(layer.kernel)[0, 0].T
    yield f"{name}.bias", _array(layer.bias)


def norm(name: str, layer: Any) -> Tensors:
    yield f"{name}.weight", _array(layer.gamma)
    yield f"{name}.bias", _array(layer.beta)


def scale(name: str, layer: Any) -> Tensors:
    yield f"{name}.weight", _array(layer.scale)


def transformer(mmdit: Any) -> Tensors:
    yield from conv("pos_embed.proj", mmdit.patch_embedding.patch_embedding)
    yield "pos_embed.pos_embed", _array(mmdit.position_embedding.position_embeddings)[None]
    for name, layer in (
        ("text_embedder", mmdit.vector_embedding),
        ("timestep_embedder", mmdit.timestep_embedding.mlp),
    ):
        yield from dense(f"time_text_embed.{name}.linear_1", layer.dense1)
        yield from dense(f"time_text_embed.{name}.linear_2", layer.dense2)
    yield from dense("context_embedder", mmdit.context_embedding)
    yield from swapped("norm_out.linear", mmdit.output_ada_layer_norm.dense)
    yield from dense("proj_out", mmdit.output_dense)
    last = len(mmdit.joint_blocks) - 1
    for number, block in enumerate(mmdit.joint_blocks):
        name, x, context = f"transformer_blocks.{number}", block.x_block, block.context_block
        yield from dense(f"{name}.norm1.linear", x.ada_layer_norm.dense)
        yield from split([f"{name}.attn.to_{c}" for c in "qkv"], x.attention_qkv)
        yield from dense(f"{name}.attn.to_out.0", x.attention_proj)
        yield from dense(f"{name}.ff.net.0.proj", x.mlp.dense1)
        yield from dense(f"{name}.ff.net.2", x.mlp.dense2)
        yield from split([f"{name}.attn.add_{c}_proj" for c in "qkv"], context.attention_qkv)
        if number == last:
            yield from swapped(f"{name}.norm1_context.linear", context.ada_layer_norm.dense)
        else:
            yield from dense(f"{name}.norm1_context.linear", context.ada_layer_norm.dense)
            yield from dense(f"{name}.attn.to_add_out", context.attention_proj)
            yield from dense(f"{name}.ff_context.net.0.proj", context.mlp.dense1)
            yield from dense(f"{name}.ff_context.net.2", context.mlp.dense2)
        if block.qk_norm:
            yield from scale(f"{name}.attn.norm_q", x.q_norm)
            yield from scale(f"{name}.attn.norm_k", x.k_norm)
            yield from scale(f"{name}.attn.norm_added_q", context.q_norm)
            yield from scale(f"{name}.attn.norm_added_k", context.k_norm)
        if block.use_dual_attention:
            yield from split([f"{name}.attn2.to_{c}" for c in "qkv"], x.attention_qkv2)
            yield from dense(f"{name}.attn2.to_out.0", x.attention_proj2)
            if block.qk_norm:
                yield from scale(f"{name}.attn2.norm_q", x.q_norm2)
                yield from scale(f"{name}.attn2.norm_k", x.k_norm2)


def text_encoder(clip: Any, projection: Any) -> Tensors:
    for kind in ("token", "position"):
        layer = getattr(clip.embedding, f"{kind}_embedding")
        values = layer.embeddings if kind == "token" else layer.position_embeddings
        yield f"text_model.embeddings.{kind}_embedding.weight", _array(values)
    for number, layer in enumerate(clip.encoder_layers):
        name = f"text_model.encoder.layers.{number}"
        attention = layer.attention
        width = layer.hidden_dim
        for part in ("query", "key", "value"):
            inner = getattr(attention, f"{part}_dense")
            yield f"{name}.self_attn.{part[0]}_proj.weight", _array(inner.kernel).reshape(width, width).T
            yield f"{name}.self_attn.{part[0]}_proj.bias", _array(inner.bias).reshape(width)
        inner = attention.output_dense
        yield f"{name}.self_attn.out_proj.weight", _array(inner.kernel).reshape(width, width).T
        yield f"{name}.self_attn.out_proj.bias", _array(inner.bias)
        yield from norm(f"{name}.layer_norm1", layer.layer_norm_1)
        yield from norm(f"{name}.layer_norm2", layer.layer_norm_2)
        yield from dense(f"{name}.mlp.fc1", layer.dense_1)
        yield from dense(f"{name}.mlp.fc2", layer.dense_2)
    yield from norm("text_model.final_layer_norm", clip.layer_norm)
    yield from dense("text_projection", projection.dense)


def text_encoder_3(t5: Any) -> Tensors:
    yield "shared.weight", _array(t5.token_embedding.embeddings)
    for number, layer in enumerate(t5.encoder_transformer_layers):
        name, attention = f"encoder.block.{number}", layer.self_attention
        for key, inner in (
            ("q", attention.query_projector),
            ("k", attention.key_projector),
            ("v", attention.value_projector),
            ("o", attention.output_projector),
        ):
            yield from dense(f"{name}.layer.0.SelfAttention.{key}", inner)
        if number == 0:
            bias = _array(attention.relative_attention_bias)
            yield f"{name}.layer.0.SelfAttention.relative_attention_bias.weight", bias
        yield f"{name}.layer.0.layer_norm.weight", _array(layer.self_attention_layer_norm.weight)
        yield from dense(f"{name}.layer.1.DenseReluDense.wi_0", layer.input_projector)
        yield from dense(f"{name}.layer.1.DenseReluDense.wi_1", layer.gate_projector)
        yield from dense(f"{name}.layer.1.DenseReluDense.wo", layer.output_projector)
        yield f"{name}.layer.1.layer_norm.weight", _array(layer.layer_norm.weight)
    yield "encoder.final_layer_norm.weight", _array(t5.encoder_layer_norm.weight)


def _resnet(name: str, block: Any) -> Tensors:
    for number in (1, 2):
        yield from norm(f"{name}.norm{number}", getattr(block, f"norm{number}"))
        yield from conv(f"{name}.conv{number}", getattr(block, f"conv{number}"))
    if hasattr(block, "residual_projection"):
        yield from conv(f"{name}.conv_shortcut", block.residual_projection)


def _half(half: str, model: Any, samplers: list[Any], count: int) -> Tensors:
    direction = "down" if half == "encoder" else "up"
    yield from conv(f"{half}.conv_in", model.input_projection)
    for number, block in enumerate(model.blocks):
        level, inner = divmod(number, count)
        yield from _resnet(f"{half}.{direction}_blocks.{level}.resnets.{inner}", block)
    convs = [layer for layer in samplers if hasattr(layer, "kernel")]  # the others enlarge
    for level, layer in enumerate(convs):
        yield from conv(f"{half}.{direction}_blocks.{level}.{direction}samplers.0.conv", layer)
    yield from _resnet(f"{half}.mid_block.resnets.0", model.mid_block_0)
    yield from _resnet(f"{half}.mid_block.resnets.1", model.mid_block_1)
    attention = model.mid_attention
    yield from norm(f"{half}.mid_block.attentions.0.group_norm", attention.group_norm)
    for key, part in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("output", "to_out.0")):
        layer = getattr(attention, f"{key}_conv2d")
        yield from conv_as_linear(f"{half}.mid_block.attentions.0.{part}", layer)
    yield from norm(f"{half}.conv_norm_out", model.output_norm)
    yield from conv(f"{half}.conv_out", model.output_projection)


def vae(model: Any) -> Tensors:
    yield from _half("encoder", model.encoder, model.encoder.downsamples, 2)
    yield from _half("decoder", model.decoder, model.decoder.upsamples, 3)


def state_dicts(backbone: Any) -> dict[str, dict[str, np.ndarray]]:
    """Every tensor that diffusers has, by component and name."""
    found = {
        "transformer": transformer(backbone.diffuser),
        "text_encoder": text_encoder(backbone.clip_l, backbone.clip_l_projection),
        "text_encoder_2": text_encoder(backbone.clip_g, backbone.clip_g_projection),
        "vae": vae(backbone.vae),
    }
    if backbone.t5 is not None:
        found["text_encoder_3"] = text_encoder_3(backbone.t5)
    return {
        component: {name: np.ascontiguousarray(value) for name, value in tensors}
        for component, tensors in found.items()
    }


def write(folder: Path, backbone: Any) -> None:
    """COMPONENT.npz for each component."""
    folder.mkdir()
    for component, tensors in state_dicts(backbone).items():
        np.savez(folder / f"{component}.npz", **tensors)
