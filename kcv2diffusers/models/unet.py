"""The denoising UNet of Stable Diffusion 1 and 2, weight-compatible with KerasCV's classes."""

from __future__ import annotations

from typing import Any

import keras

from kcv2diffusers.diffusion import LATENT_CHANNELS
from kcv2diffusers.models.config import UNetConfig
from kcv2diffusers.models.layers import (
    ACTIVATIONS,
    Block,
    Composite,
    PaddedConv2D,
    Tensor,
    UpSampling2D,
    apply,
    attention,
    dense,
    dtype_policy,
    group_norm,
    layer_norm,
    to_image,
    to_sequence,
)


class ResBlock(Block):
    """A residual block: two convolutions, with the timestep embedding added between them."""

    width: int

    def __init__(self, width: int, groups: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.entry_flow = [group_norm(groups), keras.layers.Activation("silu"), PaddedConv2D(width, 3)]
        self.embedding_flow = [keras.layers.Activation("silu"), dense(width)]
        self.exit_flow = [group_norm(groups), keras.layers.Activation("silu"), PaddedConv2D(width, 3)]

    def build(self, input_shape: Any) -> None:
        self.residual_projection = PaddedConv2D(self.width, 1) if input_shape[0][-1] != self.width else None
        super().build(input_shape)

    def compute(self, inputs: Tensor, embedding: Tensor) -> Tensor:
        x = inputs
        for layer in self.entry_flow:
            x = apply(layer, x)
        for layer in self.embedding_flow:
            embedding = apply(layer, embedding)
        x = x + embedding[:, None, None]
        for layer in self.exit_flow:
            x = apply(layer, x)
        return x + (inputs if self.residual_projection is None else apply(self.residual_projection, inputs))


class SpatialTransformer(Block):
    """A transformer block over the pixels of a feature map, with cross-attention to the text."""

    def __init__(self, width: int, heads: int, config: UNetConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm = group_norm(config.norm_groups)
        self.proj1 = dense(width) if config.linear_projection else PaddedConv2D(width, 1)
        self.transformer_block = BasicTransformerBlock(width, heads, config.gelu)
        self.proj2 = dense(width) if config.linear_projection else PaddedConv2D(width, 1)

    def compute(self, inputs: Tensor, context: Tensor) -> Tensor:
        x = to_sequence(apply(self.proj1, apply(self.norm, inputs)))
        x = apply(self.transformer_block, [x, context])
        return apply(self.proj2, to_image(x, like=inputs)) + inputs


class BasicTransformerBlock(Composite):
    """Self-attention, cross-attention to the text and a GEGLU feed-forward layer.

    Each is pre-normalised and has a residual connection.
    """

    def __init__(self, width: int, heads: int, gelu: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm1 = layer_norm()
        self.attn1 = CrossAttention(width, heads)
        self.norm2 = layer_norm()
        self.attn2 = CrossAttention(width, heads)
        self.norm3 = layer_norm()
        self.geglu = GEGLU(4 * width, gelu)
        self.dense = dense(width)

    def call(self, inputs: list[Tensor]) -> Tensor:
        x, context = inputs
        normed = apply(self.norm1, x)
        x = apply(self.attn1, [normed, normed]) + x
        x = apply(self.attn2, [apply(self.norm2, x), context]) + x
        return apply(self.dense, apply(self.geglu, apply(self.norm3, x))) + x


class CrossAttention(Composite):
    """Multi-head attention of a sequence to a context, which may be the sequence itself."""

    def __init__(self, width: int, heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads = heads
        self.to_q = dense(width, use_bias=False)
        self.to_k = dense(width, use_bias=False)
        self.to_v = dense(width, use_bias=False)
        self.out_proj = dense(width)

    def call(self, inputs: list[Tensor]) -> Tensor:
        x, context = inputs
        query, key, value = apply(self.to_q, x), apply(self.to_k, context), apply(self.to_v, context)
        return apply(self.out_proj, attention(query, key, value, self.heads))


class GEGLU(Composite):
    """Gated GELU: one linear projection multiplied by the GELU of another."""

    def __init__(self, width: int, gelu: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.gelu = ACTIVATIONS[gelu]
        self.dense = dense(2 * width)

    def call(self, inputs: Tensor) -> Tensor:
        x = apply(self.dense, inputs)
        return x[..., : self.width] * self.gelu(x[..., self.width :])


class Upsample(Composite):
    """Upsample height and width by 2 with nearest-neighbour repetition, then convolve."""

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ups = UpSampling2D(2)
        self.conv = PaddedConv2D(width, 3)

    def call(self, inputs: Tensor) -> Tensor:
        return apply(self.conv, apply(self.ups, inputs))


def build_unet(config: UNetConfig, dtype: str | None = None) -> keras.Model:
    """Build the UNet as a Keras model with random weights.

    Inputs, by name: `latent` (batch, height / 8, width / 8, 4), `timestep_embedding` (batch,
    `config.timestep_width`) and `context` (batch, length, `config.context_width`), the text encoder's output.
    Output: the model's prediction (noise or v), in the shape of `latent`. Height and width are multiples of
    64 pixels. `dtype` is a Keras dtype policy; default: the global one.
    """
    with dtype_policy(dtype):
        latent = keras.Input((None, None, LATENT_CHANNELS), name="latent")
        timestep_embedding = keras.Input((config.timestep_width,), name="timestep_embedding")
        context = keras.Input((None, config.context_width), name="context")

        def res(x: Tensor, width: int) -> Tensor:
            return ResBlock(width, config.norm_groups)([x, embedding])

        def transform(x: Tensor, level: int) -> Tensor:
            return SpatialTransformer(config.widths[level], config.heads[level], config)([x, context])

        embedding = dense(4 * config.widths[0])(timestep_embedding)
        embedding = keras.layers.Activation("silu")(embedding)
        embedding = dense(4 * config.widths[0])(embedding)

        coarsest = len(config.widths) - 1
        x = PaddedConv2D(config.widths[0], 3)(latent)
        skips = [x]
        for level, width in enumerate(config.widths):
            for _ in range(config.blocks):
                x = res(x, width)
                if level != coarsest:
                    x = transform(x, level)
                skips.append(x)
            if level != coarsest:
                x = PaddedConv2D(width, 3, strides=2)(x)
                skips.append(x)

        x = res(x, config.widths[-1])
        x = transform(x, coarsest)
        x = res(x, config.widths[-1])

        for level, width in reversed(list(enumerate(config.widths))):
            for _ in range(config.blocks + 1):
                x = res(keras.layers.Concatenate()([x, skips.pop()]), width)
                if level != coarsest:
                    x = transform(x, level)
            if level != 0:
                x = Upsample(width)(x)

        x = group_norm(config.norm_groups)(x)
        x = keras.layers.Activation("silu")(x)
        x = PaddedConv2D(LATENT_CHANNELS, 3)(x)
        return keras.Model([latent, timestep_embedding, context], x, name="unet")
